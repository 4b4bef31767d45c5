"""Attention maps: what each token of a block looks at, read while a model runs.

Nothing of this costs a model that nobody looks at: the weights, which fused attention never forms,
are computed a second time from the queries and keys that pass by.
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

from lg.models.backbone import Backbone, evaluating, unwrap
from lg.models.convit import GatedAttention


class _Recorder(TorchFunctionMode):
    """Keeps the attention weights [B, M, Q, K] that are computed, or implied, while it is on."""

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
            self.found.append(result.detach())  # attention that is not fused
        return result


def _is_attention(result: Any) -> bool:
    """Whether a softmax gave shares of keys: four dimensions, of which rows sum to one."""
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
    """Return the weights behind `F.scaled_dot_product_attention`, whose arguments these are."""
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
    """Return the attention weights of one block, in evaluation mode; the model stays as it was.

    Args:
        model: A `Backbone`, bare or wrapped by DistributedDataParallel or torch.compile.
        images: [B, C, H, W].
        index: The block, counted as INTER_STUDENT_INDEX counts.

    Returns:
        [B, M, Q, K]: for each of M heads, the share that each of Q queries gives to each of K keys;
        a row sums to 1. Queries are the class token (if the block has one), then the map row by
        row: its size is that of the block's feature map. Keys are the same tokens, or a coarser
        map where the family reduces keys (PVT, PVTv2, CvT), again behind the class token. A timm
        model may differ: windows count as images (Swin), channels attend to channels (XCiT).

    Raises:
        ValueError: There is no such block, or it has no attention of this kind (CNNs, for example).
    """
    backbone = unwrap(model)
    if not 0 <= index < len(backbone.blocks):
        raise ValueError(
            f"block index {index} is out of range: the model has {len(backbone.blocks)} blocks, so "
            f"0 to {len(backbone.blocks) - 1} are allowed"
        )
    found = _record(backbone, images, index)
    if not found:
        raise ValueError(
            f"block {index} ({backbone.block_names[index]}) of this {backbone.family} model has no "
            "softmax attention to show: choose a block of a transformer"
        )
    return found[0]


def _mixture(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The attention of a gated layer, ours or timm's own."""
    if isinstance(module, GatedAttention):
        return module.attention(tokens)
    module.rel_indices = module.get_rel_indices(
        tokens.shape[1]
    )  # else worked out at the first pass
    return module.get_attention(tokens)


def _record(backbone: Backbone, images: torch.Tensor, index: int) -> list[torch.Tensor]:
    """Run the model and return what the recorder, on during one block, has found."""
    block = backbone.blocks[index]
    recorder = _Recorder()
    mixed: list[torch.Tensor] = []

    def start(*_: Any) -> None:
        recorder.__enter__()

    def stop(*_: Any) -> None:
        recorder.__exit__(None, None, None)

    def mix(module: nn.Module, inputs: tuple) -> None:
        mixed.append(_mixture(module, inputs[0]))

    # `always_call`: a block that raises must not leave the recorder on.
    handles = [
        block.register_forward_pre_hook(start),
        block.register_forward_hook(stop, always_call=True),
    ]
    # Gated attention is the mixture of two, which the layer itself knows how to form.
    gated = [m for m in block.modules() if isinstance(m, (GatedAttention, GPSA))]
    handles += [m.register_forward_pre_hook(mix) for m in gated]
    try:
        with evaluating(backbone), torch.compiler.set_stance("force_eager"):
            backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    return mixed or recorder.found
