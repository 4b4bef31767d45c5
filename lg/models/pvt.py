"""PVT v1: a pyramid of transformers with keys and values on a coarser map.

Source: Wang et al., "Pyramid Vision Transformer", arXiv 2102.12122, section 3.2 (pyramid) and 3.3
(spatial-reduction attention).

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lg.models.backbone import Backbone
from lg.models.key_table import KeyTable
from lg.models.layers import (
    attend,
    check_heads,
    check_patches,
    drop_path_ramp,
    stage_sides,
    staged_backbone,
    to_tokens,
)
from lg.models.pyramid import Block, PatchEmbed, Pyramid, Size, Stage

KEYS = KeyTable(
    renames=(
        ("stages.{}.pos_embed", "pos_embed{+1}"),
        ("stages.{}.cls_token", "cls_token"),
        ("stages.{}.patch_embed", "patch_embed{+1}"),
        ("stages.{}.blocks", "block{+1}"),
    ),
    order=(
        ("pos_embed{}",),
        ("cls_token",),
        ("patch_embed{}", "block{}"),
        ("norm",),
        ("head",),
    ),
)


class SpatialReductionAttention(nn.Module):
    """Attention with keys and values reduced by `sr_ratio` per side."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        sr_ratio: int,
        ln_eps: float,
        drop_rate: float,
        attention_drop_rate: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_drop_rate = attention_drop_rate
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim, eps=ln_eps) if sr_ratio > 1 else None

    def forward(self, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        """Map tokens [B, N, C] on a map of `size` to [B, N, C]."""
        source = tokens
        if self.sr is not None and self.norm is not None:
            source = self.norm(to_tokens(self.sr(tokens.transpose(1, 2).unflatten(2, size))))
        key, value = self.kv(source).chunk(2, dim=-1)
        attended = attend(
            self.q(tokens),
            key,
            value,
            num_heads=self.num_heads,
            drop_rate=self.attention_drop_rate if self.training else 0.0,
        )
        return self.proj_drop(self.proj(attended))


def pvt(
    *,
    img_size: int,
    in_channels: int = 3,
    num_classes: int,
    patch_size: Sequence[int],
    hidden_dim: Sequence[int],
    depth: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: Sequence[float],
    sr_ratio: Sequence[int],
    ln_eps: float = 1e-6,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    attention_drop_rate: float = 0.0,
) -> Backbone:
    """Return a PVT v1; sequences hold one entry per stage.

    Args: as in `lg.models.backbone`, where `img_size` is a multiple of the product of `patch_size`,
    and `sr_ratio`, the reduction of keys and values per side. It is 1 in the last stage, because
    the class token there has no place on the map.
    """
    check_heads(hidden_dim, num_heads)
    check_patches(img_size, patch_size)
    if sr_ratio[-1] != 1:
        raise ValueError(
            f"sr_ratio is {list(sr_ratio)}: the last stage holds the class token, which cannot be "
            "reduced with the map; make its last entry 1"
        )
    no_padding = [0] * len(depth)
    sides = stage_sides(img_size, patch_size, patch_size, no_padding, sr_ratio=sr_ratio)
    has_token = [False] * (len(depth) - 1) + [True]
    ramp = iter(drop_path_ramp(drop_path_rate, sum(depth)))
    stages = []
    for i, (channels, dim) in enumerate(zip([in_channels, *hidden_dim], hidden_dim, strict=False)):
        embed = PatchEmbed(channels, dim, patch_size[i], patch_size[i], ln_eps=ln_eps)
        blocks = [
            Block(
                dim,
                SpatialReductionAttention(
                    dim,
                    num_heads=num_heads[i],
                    sr_ratio=sr_ratio[i],
                    ln_eps=ln_eps,
                    drop_rate=drop_rate,
                    attention_drop_rate=attention_drop_rate,
                ),
                mlp_ratio=mlp_ratio[i],
                ln_eps=ln_eps,
                drop_rate=drop_rate,
                drop_path_rate=next(ramp),
            )
            for _ in range(depth[i])
        ]
        stage = Stage(
            embed,
            blocks,
            dim=dim,
            num_patches=sides[i] ** 2,
            with_cls_token=has_token[i],
            drop_rate=drop_rate,
        )
        stages.append(stage)
    return staged_backbone(
        Pyramid(stages, dim=hidden_dim[-1], num_classes=num_classes, ln_eps=ln_eps),
        family="PVT",
        keys=KEYS,
        hidden_dim=hidden_dim,
        depth=depth,
        sides=sides,
        prefix=[int(token) for token in has_token],
    )
