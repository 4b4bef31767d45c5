"""PVTv2: a pyramid of transformers with overlapping patches and convolutional MLPs, on timm.

Source: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", arXiv 2106.13797.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.pvt_v2 import OverlapPatchEmbed, PyramidVisionTransformerV2
from torch import nn

from lg.models.backbone import Backbone
from lg.models.key_table import KeyTable
from lg.models.layers import check_depth, check_widths, conv_size, pyramid, smallest_image

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
    """Return a PVTv2; sequences hold one entry a stage.

    Args:
        img_size: Height and width of the images in pixels.
        in_channels: Channels of the images.
        num_classes: K.
        patch_size: Side of a patch, in pixels of the stage's input; half of it is padding.
        patch_stride: Pixels between patches, less than `patch_size`.
        hidden_dim: Channels, multiples of `num_heads`.
        depth: Number of blocks, 1 or more.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP over the channels.
        sr_ratio: Reduction of keys and values per side.
        ln_eps: Added to the variance in LayerNorm.
        drop_rate: Dropout after the projection of the attention and in the MLP.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        attention_drop_rate: Dropout on the attention weights.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    check_widths(hidden_dim, num_heads)
    check_depth(depth)
    sides = _sides(img_size, patch_size, patch_stride, sr_ratio)
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
    # timm fixes patches of 7 and 3 pixels; the config does not.
    for i, stage in enumerate(net.stages):
        embed = OverlapPatchEmbed(
            patch_size=patch_size[i],
            stride=patch_stride[i],
            in_chans=[in_channels, *hidden_dim][i],
            embed_dim=hidden_dim[i],
        )
        embed.apply(net._init_weights)
        if i == 0:
            net.patch_embed = embed
        else:
            stage.downsample = embed  # type: ignore[assignment]
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = ln_eps
    return pyramid(
        net,
        family="PVTv2",
        keys=KEYS,
        hidden_dim=hidden_dim,
        depth=depth,
        sides=sides,
        prefix=[0] * len(depth),
    )


def _sides(
    img_size: int,
    patch_size: Sequence[int],
    patch_stride: Sequence[int],
    sr_ratio: Sequence[int],
) -> list[int]:
    """Return the side of each stage's map; refuse patches that leave gaps, and vanishing maps."""
    for patch, stride in zip(patch_size, patch_stride, strict=True):
        if patch <= stride:
            raise ValueError(
                f"TRANSFORMER.PATCH_SIZE {patch} does not overlap at TRANSFORMER.PATCH_STRIDE "
                f"{stride}: use a larger patch or a smaller stride"
            )

    def sides_of(size: int) -> list[int]:
        sides = []
        for patch, stride in zip(patch_size, patch_stride, strict=True):
            size = conv_size(size, kernel=patch, stride=stride, padding=patch // 2)
            sides.append(size)
        return sides

    def fits(size: int) -> bool:
        return all(side >= ratio for side, ratio in zip(sides_of(size), sr_ratio, strict=True))

    if not fits(img_size):
        maps = ", ".join(f"{side} x {side}" for side in sides_of(img_size))
        raise ValueError(
            f"MODEL.IMG_SIZE {img_size} gives the stages maps of {maps}, of which PVT.SR_RATIO "
            f"{list(sr_ratio)} leaves nothing in one: {smallest_image(fits)}, or lower that entry"
        )
    return sides_of(img_size)
