"""What several transformers share: attention over split heads, initial weights, sizes of maps.

Shapes: B batch, N tokens, C channels, M heads, H and W the height and width of a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import nn

from lg.models.backbone import Backbone, MapLayout
from lg.models.key_table import KeyTable

INIT_STD = 0.02  # of the initial weights of linear layers, tokens and positions


def split_heads(tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return [B, N, C] as [B, M, N, C / M]."""
    return tokens.unflatten(2, (num_heads, -1)).transpose(1, 2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_heads: int,
    drop_rate: float,
    scale: float | None = None,
) -> torch.Tensor:
    """Return softmax attention [B, N, C] of queries [B, N, C] over keys and values [B, K, C].

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        num_heads: M, which divides C.
        drop_rate: Dropout on the attention weights; pass 0 in evaluation.
        scale: Factor of the scores; None for one over the root of a head's width.
    """
    query, key, value = (split_heads(tokens, num_heads) for tokens in (query, key, value))
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:  # see fuse_attention
        scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT
        heads = F.dropout(scores.softmax(dim=-1), drop_rate) @ value
    else:
        heads = F.scaled_dot_product_attention(query, key, value, dropout_p=drop_rate, scale=scale)
    return heads.transpose(1, 2).flatten(2)


def fuse_attention(net: nn.Module, fused: bool) -> None:
    """Let the attention layers of a timm model run fused or as two products and a softmax.

    CPUs train faster with fused attention in float32, but in bf16 1.5 to 4 times faster without.
    """
    for module in net.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = fused  # type: ignore[assignment]


def to_tokens(features: torch.Tensor) -> torch.Tensor:
    """Return a map [B, C, H, W] as tokens [B, H W, C]."""
    return features.flatten(2).transpose(1, 2)


def drop_path_ramp(rate: float, depth: int) -> list[float]:
    """Return the stochastic depth of each block: linear from 0 at the first to `rate` at the last.

    Source: Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382, section 4.
    """
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def init_linear(module: nn.Module) -> None:
    """Draw a linear layer's weights from the truncated normal of the ViT papers; set its bias 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def set_norm_eps(net: nn.Module, eps: float) -> None:
    """Set the epsilon of every LayerNorm, where timm fixes it."""
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def gains_from_channels_last(net: nn.Module) -> bool:
    """Return whether a CPU computes the net faster with channels as the innermost dimension.

    These are CNNs with BatchNorm whose spatial convolutions are narrow (at most 64 channels, as in
    the CIFAR form of ResNet) or depthwise. Measured with AVX-512: ResNets with wider convolutions
    lose, and convolutions inside transformers make no difference.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    is_wide = any(
        c.groups == 1 and max(c.kernel_size) > 1 and c.in_channels > 64 for c in convolutions
    )
    return not is_wide and any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def conv_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Return the side of a convolution's output; 0 or less if the kernel does not fit."""
    return (size + 2 * padding - kernel) // stride + 1


def stage_sides(
    img_size: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    sr_ratio: Sequence[int] | None = None,
) -> list[int]:
    """Return the side of each stage's map, where each stage starts with a convolution.

    Args:
        img_size: Height and width of the images in pixels.
        kernel: Kernel of each convolution.
        stride: Stride of each convolution.
        padding: Zeros around the input of each convolution.
        sr_ratio: Factor by which each stage reduces the side of its map.

    Raises:
        ValueError: A stage, or its reduced map, is left without a pixel.
    """
    geometry = list(zip(kernel, stride, padding, strict=True))
    sides: list[int] = []
    for one in geometry:
        sides.append(conv_size(sides[-1] if sides else img_size, *one))
    smallest = 1  # side of the map that each convolution needs, from the last to the first
    for (k, s, p), low in reversed(list(zip(geometry, sr_ratio or [1] * len(sides), strict=True))):
        smallest = max((max(smallest, low) - 1) * s + k - 2 * p, 1)
    if img_size < smallest:
        maps = ", ".join(f"{max(side, 0)} x {max(side, 0)}" for side in sides)
        limit = f" for sr_ratio {list(sr_ratio)}" if sr_ratio else ""
        raise ValueError(
            f"img_size {img_size} is too small{limit}: the stages get maps of {maps}; "
            f"use an image size of {smallest} or more"
        )
    return sides


def check_patches(img_size: int, patch_size: Sequence[int]) -> None:
    """Reject images that do not divide into patches, or patches of patches.

    Raises:
        ValueError: The message names the nearest sizes that divide.
    """
    step = math.prod(patch_size)
    if img_size % step:
        below = max(img_size // step, 1) * step
        shown = f"patch_size {step}"
        if len(patch_size) > 1:
            shown = f"{step}, the product of patch_size {list(patch_size)}"
        raise ValueError(
            f"img_size {img_size} is not a multiple of {shown}: use an image size such as {below} "
            f"or {below + step}"
        )


def check_heads(hidden_dim: Sequence[int], num_heads: Sequence[int]) -> None:
    """Reject widths that the heads do not divide.

    Raises:
        ValueError: The message names the width and the heads.
    """
    for width, heads in zip(hidden_dim, num_heads, strict=True):
        if width % heads:
            raise ValueError(
                f"hidden_dim {width} is not divisible by num_heads {heads}: every head has the "
                "same width"
            )


def staged_backbone(
    net: nn.Module,
    *,
    family: str,
    keys: KeyTable,
    hidden_dim: Sequence[int],
    depth: Sequence[int],
    sides: Sequence[int],
    prefix: Sequence[int],
    stages: str = "stages",
) -> Backbone:
    """Return a net of stages (`<stages>.I.blocks.J`, tokens on square maps) as a `Backbone`.

    Args:
        net: The network.
        family: As in MODEL.TYPE.
        keys: Published names of its parameters.
        hidden_dim: Channels of each stage.
        depth: Blocks of each stage.
        sides: Height and width of each stage's map.
        prefix: Class tokens of each stage.
        stages: Name of the list of stages in `net`.
    """
    return Backbone(
        net,
        family=family,
        keys=keys,
        block_names=[f"{stages}.{i}.blocks.{j}" for i, n in enumerate(depth) for j in range(n)],
        layouts=[
            MapLayout("tokens", channels, tokens, (side, side))
            for channels, count, side, tokens in zip(hidden_dim, depth, sides, prefix, strict=True)
            for _ in range(count)
        ],
    )
