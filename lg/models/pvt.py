"""PVT v1: a pyramid of four transformers whose keys and values live on a coarser grid.

Source: Wang et al., "Pyramid Vision Transformer", arXiv 2102.12122, section 3.2 (pyramid) and 3.3
(spatial-reduction attention).

Shapes: B batch, N tokens, C channels, H and W the map of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import nn

from lg.models.backbone import Backbone
from lg.models.key_table import KeyTable
from lg.models.layers import (
    INIT_STD,
    attend,
    check_depth,
    check_widths,
    drop_path_ramp,
    init_linear,
    pyramid,
    to_tokens,
)

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

Size = tuple[int, int]  # height and width of a map


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values are first reduced `sr_ratio` times per side."""

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
        """Tokens [B, N, C] of a map of `size` to [B, N, C]."""
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


class PVTBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual under stochastic depth."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float,
        sr_ratio: int,
        ln_eps: float,
        drop_rate: float,
        attention_drop_rate: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=ln_eps)
        self.attn = SpatialReductionAttention(
            dim,
            num_heads=num_heads,
            sr_ratio=sr_ratio,
            ln_eps=ln_eps,
            drop_rate=drop_rate,
            attention_drop_rate=attention_drop_rate,
        )
        self.norm2 = nn.LayerNorm(dim, eps=ln_eps)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), drop=drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        """Tokens [B, N, C] of a map of `size` to [B, N, C]."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), size))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, embedded and normalised."""

    def __init__(self, in_channels: int, dim: int, *, patch_size: int, ln_eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim, eps=ln_eps)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, Size]:
        """A map [B, C, H, W] to tokens [B, N, dim] and the size of their map."""
        patches = self.proj(features)
        return self.norm(to_tokens(patches)), (patches.shape[2], patches.shape[3])


class PVTStage(nn.Module):
    """Patch embedding, learned positions, blocks; the last stage has the class token as well."""

    def __init__(
        self,
        patch_embed: PatchEmbed,
        blocks: Sequence[PVTBlock],
        *,
        dim: int,
        side: int,
        with_cls_token: bool,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.pos_embed = nn.Parameter(torch.zeros(1, side**2 + with_cls_token, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if with_cls_token else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(blocks)
        for parameter in (self.pos_embed, self.cls_token):
            if parameter is not None:
                trunc_normal_(parameter, std=INIT_STD)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """A map [B, C, H, W] to the next map, or to all tokens where there is a class token."""
        tokens, size = self.patch_embed(features)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.pos_drop(tokens + self.pos_embed)
        for block in self.blocks:
            tokens = block(tokens, size)
        return tokens if self.cls_token is not None else tokens.transpose(1, 2).unflatten(2, size)


class PyramidVisionTransformer(nn.Module):
    """The stages, one final norm, and a head on the class token."""

    def __init__(
        self, stages: Sequence[PVTStage], *, dim: int, num_classes: int, ln_eps: float
    ) -> None:
        super().__init__()
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dim, eps=ln_eps)
        self.head = nn.Linear(dim, num_classes)
        self.apply(init_linear)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] to logits [B, K]."""
        return self.head(self.norm(self.stages(images))[:, 0])

    def get_classifier(self) -> nn.Module:
        """The classifier, by the name timm's models give it."""
        return self.head


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
    """Return a PVT; sequences hold one entry a stage.

    Args:
        img_size: Height and width of the images in pixels, a multiple of the product of
            `patch_size`.
        in_channels: Channels of the images.
        num_classes: K.
        patch_size: Side of a patch, in pixels of the stage's input.
        hidden_dim: Channels, multiples of `num_heads`.
        depth: Number of blocks, 1 or more.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP over the channels.
        sr_ratio: Reduction of keys and values per side; 1 in the last stage, whose class token has
            no place on a map.
        ln_eps: Added to the variance in LayerNorm.
        drop_rate: Dropout on the tokens after positions are added, after the projection of the
            attention and in the MLP.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        attention_drop_rate: Dropout on the attention weights.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    check_widths(hidden_dim, num_heads)
    check_depth(depth)
    sides = _sides(img_size, patch_size)
    _check_reductions(sides, sr_ratio, img_size)
    ramp = iter(drop_path_ramp(drop_path_rate, sum(depth)))
    inputs = [in_channels, *hidden_dim]
    last = len(depth) - 1
    stages = []
    for i, dim in enumerate(hidden_dim):
        block = partial(
            PVTBlock,
            dim,
            num_heads=num_heads[i],
            mlp_ratio=mlp_ratio[i],
            sr_ratio=sr_ratio[i],
            ln_eps=ln_eps,
            drop_rate=drop_rate,
            attention_drop_rate=attention_drop_rate,
        )
        stages.append(
            PVTStage(
                PatchEmbed(inputs[i], dim, patch_size=patch_size[i], ln_eps=ln_eps),
                [block(drop_path_rate=next(ramp)) for _ in range(depth[i])],
                dim=dim,
                side=sides[i],
                with_cls_token=i == last,
                drop_rate=drop_rate,
            )
        )
    net = PyramidVisionTransformer(
        stages, dim=hidden_dim[-1], num_classes=num_classes, ln_eps=ln_eps
    )
    prefix = [int(i == last) for i in range(len(depth))]
    return pyramid(
        net, family="PVT", keys=KEYS, hidden_dim=hidden_dim, depth=depth, sides=sides, prefix=prefix
    )


def _sides(img_size: int, patch_size: Sequence[int]) -> list[int]:
    """Return the side of each stage's map."""
    step = math.prod(patch_size)
    if img_size % step:
        below = max(img_size // step, 1) * step
        raise ValueError(
            f"MODEL.IMG_SIZE {img_size} is not a multiple of {step}, the product of "
            f"TRANSFORMER.PATCH_SIZE {list(patch_size)}: use an image size such as {below} or "
            f"{below + step}"
        )
    return [img_size // math.prod(patch_size[: i + 1]) for i in range(len(patch_size))]


def _check_reductions(sides: Sequence[int], sr_ratio: Sequence[int], img_size: int) -> None:
    """Refuse reductions that leave nothing, or that meet the class token."""
    if sr_ratio[-1] != 1:
        raise ValueError(
            f"PVT.SR_RATIO is {list(sr_ratio)}: the last stage holds the class token, which cannot "
            "be reduced with the map; make its last entry 1"
        )
    for side, ratio in zip(sides, sr_ratio, strict=True):
        if ratio > side:
            raise ValueError(
                f"PVT.SR_RATIO {list(sr_ratio)} reduces a map of {side} x {side} by {ratio}, which "
                f"leaves nothing of it: lower that entry to {side} or less, or raise "
                f"MODEL.IMG_SIZE {img_size}"
            )
