"""Attention maps: the weights that each token of a block gives to the others.

Fused attention never forms the weights, so they are computed from the queries and keys in a second
run of the block. Models that are not inspected have no extra cost. (timm's `AttentionExtract` reads
unfused attention only.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.convit import GPSA
from torch import nn
from torch.overrides import TorchFunctionMode

from lg.models.backbone import evaluating, unwrap
from lg.models.convit import GatedAttention


class _Recorder(TorchFunctionMode):
    """Records the attention weights [B, M, Q, K] that are computed, or implied, inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.found.append(attention_weights(*args, **kwargs))
        elif func in _SOFTMAX and _is_attention(result):
            self.found.append(result.detach())  # unfused attention
        return result


def _is_attention(result: Any) -> bool:
    """Return whether the result of a softmax can be attention: four dimensions, rows sum to 1."""
    if not isinstance(result, torch.Tensor) or result.ndim != 4:
        return False
    return bool((result.float().sum(dim=-1) - 1).abs().max() < 1e-2)


_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return the weights of `F.scaled_dot_product_attention`, for the same arguments."""
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = factor * query @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if hidden else scores + attn_mask
    return scores.softmax(dim=-1)


@torch.compiler.disable
def attention_maps(model: nn.Module, images: torch.Tensor, index: int) -> torch.Tensor:
    """Return the attention weights of one block, in evaluation mode; the model does not change.

    Args:
        model: A `Backbone`, bare or wrapped by DistributedDataParallel or torch.compile.
        images: [B, C, H, W].
        index: The block, counted as INTER_STUDENT_INDEX counts.

    Returns:
        [B, M, Q, K]: for each of M heads, the weights that each of Q queries gives to the K keys; a
        row sums to 1. Queries are the class token (if the block has one), then the map row by row:
        its size is that of the block's feature map. Keys are the same tokens, or a coarser map
        after the class token where the family reduces keys (PVT, PVTv2, CvT). A timm model may
        differ: windows count as images (Swin), channels attend to channels (XCiT).

    Raises:
        ValueError: There is no such block, or it has no softmax attention (CNNs, for example).
    """
    backbone = unwrap(model)
    backbone.check_indices([index])
    block = backbone.blocks[index]
    # Gated attention mixes two softmaxes, so the layer itself computes its weights.
    gated = next((m for m in block.modules() if isinstance(m, (GatedAttention, GPSA))), None)
    recorder = _Recorder()

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if isinstance(module, (GatedAttention, GPSA)):
            recorder.found = [module.get_attention(args[0])]
        else:
            with recorder:
                module.forward(*args, **kwargs)

    handle = (gated or block).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with evaluating(backbone), torch.compiler.set_stance("force_eager"):
            backbone(images)
    finally:
        handle.remove()
    if not recorder.found:
        raise ValueError(
            f"block {index} ({backbone.block_names[index]}) of this {backbone.family} model has no "
            "softmax attention: choose a block of a transformer"
        )
    return recorder.found[0]
