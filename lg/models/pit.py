"""PiT: a vision transformer whose maps are pooled between stages, on timm.

Source: Heo et al., "Rethinking Spatial Dimensions of Vision Transformers", arXiv 2103.16302.
Departure, as in the published code: stochastic depth rises as i / total, so the last block stays
below the given rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from timm.layers import DropPath
from timm.models.pit import PoolingVisionTransformer

from lg.models.backbone import Backbone
from lg.models.key_table import KeyTable
from lg.models.layers import check_heads, set_norm_eps, stage_sides, staged_backbone

KEYS = KeyTable(
    renames=(
        ("transformers.{}.blocks.{}.attn.qkv", "transformers.{}.blocks.{}.attn.qkv_transform"),
        ("transformers.{}.blocks.{}.attn.proj", "transformers.{}.blocks.{}.attn.projection"),
        ("transformers.{}.pool", "pools.{-1}"),
    ),
    order=(
        ("pos_embed", "cls_token"),
        ("patch_embed",),
        ("transformers",),
        ("pools",),
        ("norm",),
        ("head",),
    ),
)


def pit(
    *,
    img_size: int,
    in_channels: int = 3,
    num_classes: int,
    patch_size: int,
    stride: int,
    hidden_dim: Sequence[int],
    depth: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: float,
    ln_eps: float = 1e-6,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    attention_drop_rate: float = 0.0,
) -> Backbone:
    """Return a PiT; sequences hold one entry per stage.

    Args: as in `lg.models.backbone`, where each `hidden_dim` is a multiple of the one before it and
    block i of n has stochastic depth i / n of `drop_path_rate`, and:
        stride: Pixels between patches; they overlap if it is smaller than `patch_size`.
    """
    check_heads(hidden_dim, num_heads)
    _check_widths(hidden_dim)
    pools = len(depth) - 1  # a 3 x 3 convolution of every other pixel between two stages
    sides = stage_sides(
        img_size, [patch_size, *[3] * pools], [stride, *[2] * pools], [0, *[1] * pools]
    )
    net = PoolingVisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        stride=stride,
        base_dims=[width // heads for width, heads in zip(hidden_dim, num_heads, strict=True)],
        depth=depth,
        heads=num_heads,
        mlp_ratio=mlp_ratio,
        num_classes=num_classes,
        in_chans=in_channels,
        proj_drop_rate=drop_rate,
        attn_drop_rate=attention_drop_rate,
    )
    net.pos_drop.p = drop_rate  # older timm misspells its argument
    set_norm_eps(net, ln_eps)
    backbone = staged_backbone(
        net,
        family="PiT",
        keys=KEYS,
        hidden_dim=hidden_dim,
        depth=depth,
        sides=sides,
        prefix=[1] * len(depth),
        stages="transformers",
    )
    for index, block in enumerate(backbone.blocks):
        rate = drop_path_rate * index / len(backbone.blocks)
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    return backbone


def _check_widths(hidden_dim: Sequence[int]) -> None:
    """Check that grouped pooling can widen the map from stage to stage."""
    for before, after in pairwise(hidden_dim):
        if after % before:
            raise ValueError(
                f"hidden_dim is {list(hidden_dim)}: grouped pooling makes {after} channels of "
                f"{before}, so each entry must be a multiple of the one before it"
            )
