"""DeiT: the plain vision transformer, on timm.

Source: Touvron et al., "Training data-efficient image transformers", arXiv 2012.12877.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lg.models.backbone import Backbone, MapLayout
from lg.models.key_table import KeyTable
from lg.models.layers import check_heads, check_patches
from lg.models.wide import widen

KEYS = KeyTable(
    renames=(
        ("patch_embed.proj", "patch_embed.projection"),
        ("blocks.{}.attn.qkv", "layers.{}.attn.qkv_transform"),
        ("blocks.{}.attn.proj", "layers.{}.attn.projection"),
        ("blocks.{}", "layers.{}"),
        ("dist_token", "distill_token"),
        ("head_dist", "distill_head"),
    ),
)


def deit(
    *,
    img_size: int,
    in_channels: int = 3,
    num_classes: int,
    patch_size: int,
    hidden_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    ln_eps: float = 1e-6,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    attention_drop_rate: float = 0.0,
    distilled: bool = False,
    wide_last: int = 0,
    lift: int = 0,
) -> Backbone:
    """Return a DeiT with zero-initialised head(s).

    Args: as in `lg.models.backbone`, and:
        distilled: Add a distillation token and head. In training the model then returns
            (class logits, distillation logits), in evaluation their mean.
        wide_last: See `lg.models.wide`.
        lift: See `lg.models.wide`.
    """
    check_patches(img_size, [patch_size])
    check_heads([hidden_dim], [num_heads])
    norm: Any = partial(nn.LayerNorm, eps=ln_eps)
    net = (VisionTransformerDistilled if distilled else VisionTransformer)(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=hidden_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        pos_drop_rate=drop_rate,  # timm's drop_rate is dropout before the head
        proj_drop_rate=drop_rate,
        attn_drop_rate=attention_drop_rate,
        drop_path_rate=drop_path_rate,
        norm_layer=norm,
    )
    width = widen(
        net,
        net.blocks,
        wide_last=wide_last,
        lift=lift,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        qkv_bias=True,
        proj_drop=drop_rate,
        attn_drop=attention_drop_rate,
        drop_path=drop_path_rate if depth > 1 else 0.0,
        norm_layer=norm,
    )
    for name, parameter in net.named_parameters():
        if name.startswith("head"):  # head, and head_dist of a distilled model
            nn.init.zeros_(parameter)
    if isinstance(net, VisionTransformerDistilled):
        net.set_distilled_training(True)
    side = img_size // patch_size
    layout = MapLayout("tokens", hidden_dim, 2 if distilled else 1, (side, side))
    return Backbone(
        net,
        family="DeiT",
        keys=KEYS,
        block_names=[f"blocks.{index}" for index in range(depth)],
        layouts=[layout] * (depth - 1) + [replace(layout, channels=width)],
    )
