"""What several transformers share: attention over split heads, stochastic-depth ramps, size checks.

Shapes: B batch, N tokens, C channels, M heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
        query: What asks.
        key: What is asked.
        value: What is answered.
        num_heads: M, which divides C.
        drop_rate: Dropout on the attention weights; 0 in evaluation.
        scale: Factor of the scores; None for one over the root of a head's width.
    """
    heads = F.scaled_dot_product_attention(
        split_heads(query, num_heads),
        split_heads(key, num_heads),
        split_heads(value, num_heads),
        dropout_p=drop_rate,
        scale=scale,
    )
    return heads.transpose(1, 2).flatten(2)


def to_tokens(features: torch.Tensor) -> torch.Tensor:
    """Return a map [B, C, H, W] as tokens [B, H W, C]."""
    return features.flatten(2).transpose(1, 2)


def drop_path_ramp(rate: float, depth: int) -> list[float]:
    """Return the stochastic depth of each block: linear from 0 at the first to `rate` at the last.

    Source: Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382, section 4.
    """
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def init_linear(module: nn.Module) -> None:
    """Draw a linear layer's weights from the truncated normal of the ViT papers; bias 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def conv_size(size: int, *, kernel: int, stride: int, padding: int) -> int:
    """Return the side of a convolution's output; 0 or less where the kernel does not fit."""
    return (size + 2 * padding - kernel) // stride + 1


def pyramid(
    net: nn.Module,
    *,
    family: str,
    keys: KeyTable,
    hidden_dim: Sequence[int],
    depth: Sequence[int],
    sides: Sequence[int],
    prefix: Sequence[int],
) -> Backbone:
    """Return a net of stages (`stages.I.blocks.J`, tokens on square maps) as a `Backbone`.

    Args:
        net: The network.
        family: As in MODEL.TYPE.
        keys: Published names of its parameters.
        hidden_dim: Channels of each stage.
        depth: Blocks of each stage.
        sides: Height and width of each stage's map.
        prefix: Class tokens of each stage.
    """
    stages = list(zip(hidden_dim, depth, sides, prefix, strict=True))
    return Backbone(
        net,
        family=family,
        keys=keys,
        block_names=[f"stages.{i}.blocks.{j}" for i, n in enumerate(depth) for j in range(n)],
        layouts=[
            MapLayout("tokens", channels, first, (side, side))
            for channels, count, side, first in stages
            for _ in range(count)
        ],
    )


def smallest_image(fits: Callable[[int], bool]) -> str:
    """Return in words the smallest image that fits, of those that anyone would use."""
    size = next((size for size in range(1, 4097) if fits(size)), None)
    return "no image fits" if size is None else f"use an image size of {size} or more"


def check_patches(img_size: int, patch_size: int) -> None:
    """Refuse images that patches do not tile.

    Raises:
        ValueError: Naming both keys and the nearest sizes that would do.
    """
    if img_size < patch_size or img_size % patch_size:
        below = max(img_size // patch_size, 1) * patch_size
        raise ValueError(
            f"MODEL.IMG_SIZE {img_size} is not a multiple of TRANSFORMER.PATCH_SIZE {patch_size}: "
            f"use an image size such as {below} or {below + patch_size}"
        )


def check_widths(hidden_dim: Sequence[int], num_heads: Sequence[int]) -> None:
    """Refuse widths that heads do not divide.

    Raises:
        ValueError: Naming both keys.
    """
    for width, heads in zip(hidden_dim, num_heads, strict=True):
        if width % heads:
            raise ValueError(
                f"TRANSFORMER.HIDDEN_DIM {width} is not divisible by TRANSFORMER.NUM_HEADS "
                f"{heads}: every head has the same width"
            )


def check_depth(depth: Sequence[int]) -> None:
    """Refuse a stage without blocks.

    Raises:
        ValueError: Naming the key.
    """
    if min(depth) < 1:
        shown = depth[0] if len(depth) == 1 else list(depth)
        raise ValueError(f"TRANSFORMER.DEPTH is {shown}: use 1 block or more")
