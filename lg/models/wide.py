"""More channels at the end of a narrow transformer: WideLast and Lift.

Tokens of a guide spread over more channels than a narrow student has. Of two remedies, WideLast
widens the last block, and Lift projects what the last block returns and keeps this projection in
the finished model. What follows, norm and classifiers, has the larger width.

Source: Tian et al., "From Per-Image Low-Rank to Encoding Mismatch", arXiv 2511.15572, and its code.
Departures: the classifier reads the class token, as the family does, where the published Lift
averages the patches; guidance reads the lifted tokens before the norm; the width is free, and the
projection heads of guidance stay, because the channels of a CNN guide are few.

Shapes: B batch, N tokens, C channels of the other blocks, W channels of the last one.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn

from lg.models.layers import init_linear


class WideBlock(Block):
    """A block of W channels that projects and normalises its tokens first."""

    def __init__(self, narrow: int, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        projection = nn.Linear(narrow, dim, bias=False)
        self.lift = nn.Sequential(projection, options["norm_layer"](dim))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map tokens [B, N, C] to [B, N, W]."""
        return super().forward(self.lift(x), *args, **kwargs)


class LiftedBlock(Block):
    """A block of C channels that projects its result to W channels."""

    def __init__(self, dim: int, wide: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.lift = nn.Linear(dim, wide, bias=False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map tokens [B, N, C] to [B, N, W]."""
        return self.lift(super().forward(x, *args, **kwargs))


def widen(
    net: Any,
    blocks: nn.Sequential,
    *,
    wide_last: int,
    lift: int,
    hidden_dim: int,
    num_heads: int,
    **options: Any,
) -> int:
    """Widen the last block, or lift its result, in place; return the channels of its result.

    Args:
        net: Has `norm`, `head` and, with distillation, `head_dist`.
        blocks: The blocks of `net`.
        wide_last: Channels of the last block, with heads as wide as those of the others; 0: as the
            others.
        lift: Channels of the projection after the last block; 0: no projection.
        hidden_dim: C.
        num_heads: Heads of the other blocks.
        **options: Of timm's `Block`, for the last block.

    Raises:
        ValueError: The heads do not divide `wide_last`.
    """
    if not (wide_last or lift):
        return hidden_dim
    head_width, width = hidden_dim // num_heads, wide_last or lift
    if wide_last % head_width:
        raise ValueError(
            f"wide_last {wide_last} is not a multiple of {head_width}, the width of a head "
            f"(hidden_dim {hidden_dim}, num_heads {num_heads})"
        )
    if wide_last:
        blocks[-1] = WideBlock(hidden_dim, width, width // head_width, **options)
    else:
        blocks[-1] = LiftedBlock(hidden_dim, width, num_heads, **options)
    net.norm = options["norm_layer"](width)
    for name in ("head", "head_dist"):
        if hasattr(net, name):
            setattr(net, name, nn.Linear(width, getattr(net, name).out_features))
            getattr(net, name).apply(init_linear)
    blocks[-1].apply(init_linear)
    return width
