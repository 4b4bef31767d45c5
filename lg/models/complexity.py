"""Size and cost of a model."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lg.models.backbone import evaluating


def complexity(model: nn.Module, image_size: int, in_channels: int = 3) -> dict[str, int]:
    """Return `params` and `macs`, the multiply-adds of the forward pass of one image."""
    # Detached: the counter follows gradients through tensors that require them, even in no_grad.
    state = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers())}
    device = next(iter(state.values())).device
    image = torch.zeros(1, in_channels, image_size, image_size, device=device)
    # The counter misses fused attention on some devices; MATH attention is two matrix products.
    attention = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, evaluating(model), attention:
        functional_call(model, state, (image,))
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "macs": counter.get_total_flops() // 2,
    }
