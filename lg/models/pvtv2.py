"""PVTv2: a pyramid of transformers with overlapping patches and convolutional MLPs, on timm.

Source: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", arXiv 2106.13797.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.pvt_v2 import OverlapPatchEmbed, PyramidVisionTransformerV2

from lg.models.backbone import Backbone
from lg.models.key_table import KeyTable
from lg.models.layers import check_heads, set_norm_eps, stage_sides, staged_backbone

KEYS = KeyTable(
    renames=(
        ("patch_embed", "patch_embed1"),
        ("stages.{}.downsample", "patch_embed{+1}"),
        ("stages.{}.blocks.{}.mlp.dwconv", "block{+1}.{}.mlp.dwconv.dwconv"),
        ("stages.{}.blocks", "block{+1}"),
        ("stages.{}.norm", "norm{+1}"),
    ),
)


def pvtv2(
    *,
    img_size: int,
    in_channels: int = 3,
    num_classes: int,
    patch_size: Sequence[int],
    patch_stride: Sequence[int],
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
    """Return a PVTv2; sequences hold one entry per stage.

    Args: as in `lg.models.backbone`, where there are no positions and half a patch is padding, and:
        patch_stride: Pixels between patches, less than `patch_size`.
        sr_ratio: Reduction of keys and values per side.
    """
    check_heads(hidden_dim, num_heads)
    for patch, stride in zip(patch_size, patch_stride, strict=True):
        if patch <= stride:
            raise ValueError(
                f"patch_size {patch} does not overlap at patch_stride {stride}: use a larger patch "
                "or a smaller stride"
            )
    padding = [patch // 2 for patch in patch_size]
    sides = stage_sides(img_size, patch_size, patch_stride, padding, sr_ratio=sr_ratio)
    net = PyramidVisionTransformerV2(
        in_chans=in_channels,
        num_classes=num_classes,
        depths=tuple(depth),
        embed_dims=tuple(hidden_dim),
        num_heads=tuple(num_heads),
        sr_ratios=tuple(sr_ratio),
        mlp_ratios=tuple(mlp_ratio),
        proj_drop_rate=drop_rate,
        attn_drop_rate=attention_drop_rate,
        drop_path_rate=drop_path_rate,
    )
    _replace_patches(net, patch_size, patch_stride, [in_channels, *hidden_dim])
    set_norm_eps(net, ln_eps)
    return staged_backbone(
        net,
        family="PVTv2",
        keys=KEYS,
        hidden_dim=hidden_dim,
        depth=depth,
        sides=sides,
        prefix=[0] * len(depth),
    )


def _replace_patches(
    net: PyramidVisionTransformerV2,
    patch_size: Sequence[int],
    patch_stride: Sequence[int],
    channels: Sequence[int],
) -> None:
    """Replace timm's patches of 7 and 3 pixels; `channels` are those before and after a stage."""
    for i, stage in enumerate(net.stages):
        embed = OverlapPatchEmbed(
            patch_size=patch_size[i],
            stride=patch_stride[i],
            in_chans=channels[i],
            embed_dim=channels[i + 1],
        )
        embed.apply(net._init_weights)
        if i == 0:
            net.patch_embed = embed
        else:
            stage.downsample = embed  # type: ignore[assignment]
