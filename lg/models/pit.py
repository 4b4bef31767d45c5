"""PiT: a vision transformer whose maps are pooled between stages, on timm.

Source: Heo et al., "Rethinking Spatial Dimensions of Vision Transformers", arXiv 2103.16302.
Departure, as in the published code: stochastic depth rises as i / total, so that the last block
stays below the given rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from timm.layers import DropPath
from timm.models.pit import PoolingVisionTransformer
from torch import nn

from lg.models.backbone import Backbone, MapLayout
from lg.models.key_table import KeyTable
from lg.models.layers import check_depth, check_widths, conv_size

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
    """Return a PiT; sequences hold one entry a stage.

    Args:
        img_size: Height and width of the images in pixels, `patch_size` or more.
        in_channels: Channels of the images.
        num_classes: K.
        patch_size: Height and width of a patch in pixels.
        stride: Pixels between patches; smaller than `patch_size`, they overlap.
        hidden_dim: Channels, multiples of `num_heads`, and each of the one before it.
        depth: Number of blocks, 1 or more.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP over the channels.
        ln_eps: Added to the variance in LayerNorm.
        drop_rate: Dropout on the map after positions are added, after the projection of the
            attention and in the MLP.
        drop_path_rate: Stochastic depth; block i of n has i / n of it.
        attention_drop_rate: Dropout on the attention weights.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    check_widths(hidden_dim, num_heads)
    check_depth(depth)
    for before, after in pairwise(hidden_dim):
        if after % before:
            raise ValueError(
                f"TRANSFORMER.HIDDEN_DIM is {list(hidden_dim)}: a pooling makes {after} channels "
                f"of {before} by groups, so each must be a multiple of the one before it"
            )
    if img_size < patch_size:
        raise ValueError(
            f"MODEL.IMG_SIZE {img_size} is smaller than TRANSFORMER.PATCH_SIZE {patch_size}: use "
            f"an image size of {patch_size} or more"
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
    net.pos_drop.p = drop_rate  # older timm misspells the argument for it
    names = [f"transformers.{i}.blocks.{j}" for i, n in enumerate(depth) for j in range(n)]
    for index, name in enumerate(names):
        rate = drop_path_rate * index / len(names)
        block = net.get_submodule(name)
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = ln_eps
    layouts = []
    side = conv_size(img_size, kernel=patch_size, stride=stride, padding=0)
    for width, count in zip(hidden_dim, depth, strict=True):
        layouts += [MapLayout("tokens", width, 1, (side, side))] * count
        side = conv_size(side, kernel=3, stride=2, padding=1)  # the pooling behind the stage
    return Backbone(net, family="PiT", keys=KEYS, block_names=names, layouts=layouts)
