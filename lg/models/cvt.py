"""CvT: stages of convolutional token embedding and attention with convolutional projections.

Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", arXiv 2103.15808, section
3.1 (embedding) and 3.2 (projection).
Departures, as in the published code: scores are divided by the root of the full width, not of a
head's width, and the MLP's activation is x * sigmoid(1.702 x).

Shapes: B batch, N patch tokens, P class tokens (0 or 1), C channels, H and W the map of a stage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from timm.layers import QuickGELU
from torch import nn

from lg.models.backbone import Backbone
from lg.models.key_table import KeyTable
from lg.models.layers import (
    attend,
    check_heads,
    conv_size,
    drop_path_ramp,
    stage_sides,
    staged_backbone,
    to_tokens,
)
from lg.models.pyramid import Block, PatchEmbed, Pyramid, Size, Stage

Geometry = tuple[int, int, int]  # kernel, stride and padding of a convolution or pooling

KEYS = KeyTable(renames=(("stages.{}", "stage{}"),))


def _projection(method: str, dim: int, geometry: Geometry) -> nn.Module:
    """Return the module that a map passes before its linear projection."""
    kernel, stride, padding = geometry
    if method == "dw_bn":
        conv = nn.Conv2d(dim, dim, kernel, stride, padding, groups=dim, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(dim)))
    if method == "avg":
        return nn.AvgPool2d(kernel, stride, padding, ceil_mode=True)
    return nn.Identity()


class ConvAttention(nn.Module):
    """Attention whose queries, keys and values are convolved before their linear projections."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        method: str,
        geometry_q: Geometry,
        geometry_kv: Geometry,
        with_cls_token: bool,
        drop_rate: float,
        attention_drop_rate: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = dim**-0.5
        self.num_prefix = int(with_cls_token)
        self.attention_drop_rate = attention_drop_rate
        # Averaging would leave fewer queries than tokens, so that method keeps the queries.
        query_method = "linear" if method == "avg" else method
        self.conv_proj_q = _projection(query_method, dim, geometry_q)
        self.conv_proj_k = _projection(method, dim, geometry_kv)
        self.conv_proj_v = _projection(method, dim, geometry_kv)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, dim)
        self.proj_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        """Map tokens [B, P + N, C] on a map of `size` to [B, P + N, C]."""
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        features = patches.transpose(1, 2).unflatten(2, size)
        # The class token has no neighbours: it joins after the convolutions.
        query, key, value = (
            torch.cat([prefix, to_tokens(convolve(features))], dim=1)
            for convolve in (self.conv_proj_q, self.conv_proj_k, self.conv_proj_v)
        )
        attended = attend(
            self.proj_q(query),
            self.proj_k(key),
            self.proj_v(value),
            num_heads=self.num_heads,
            drop_rate=self.attention_drop_rate if self.training else 0.0,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(attended))


def cvt(
    *,
    img_size: int,
    in_channels: int = 3,
    num_classes: int,
    patch_size: Sequence[int],
    patch_stride: Sequence[int],
    patch_padding: Sequence[int],
    hidden_dim: Sequence[int],
    depth: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: Sequence[float],
    with_cls_token: Sequence[bool],
    qkv_proj_method: Sequence[str],
    kernel_qkv: Sequence[int],
    stride_kv: Sequence[int],
    stride_q: Sequence[int],
    padding_kv: Sequence[int],
    padding_q: Sequence[int],
    ln_eps: float = 1e-5,
    drop_rate: Sequence[float],
    drop_path_rate: Sequence[float],
    attention_drop_rate: Sequence[float],
) -> Backbone:
    """Return a CvT; sequences hold one entry per stage.

    Args: as in `lg.models.backbone`, with a `drop_path_rate` that rises from 0 in every stage, and:
        patch_stride: Stride of the embedding.
        patch_padding: Zeros around the embedding's input.
        with_cls_token: Whether the stage has a class token. The head reads the last stage's; the
            token of an earlier stage is dropped at the end of that stage.
        qkv_proj_method: `dw_bn` (depthwise convolution, BatchNorm), `avg` (average pooling of keys
            and values) or `linear` (neither) before the linear projections.
        kernel_qkv: Kernel of these convolutions or poolings.
        stride_kv: Stride for keys and values.
        stride_q: Stride for queries; with the kernel and padding it must keep the size.
        padding_kv: Zeros around keys and values.
        padding_q: Zeros around queries.
    """
    check_heads(hidden_dim, num_heads)
    sides = stage_sides(img_size, patch_size, patch_stride, patch_padding)
    stages = []
    for i, (channels, dim) in enumerate(zip([in_channels, *hidden_dim], hidden_dim, strict=False)):
        geometry_q = (kernel_qkv[i], stride_q[i], padding_q[i])
        geometry_kv = (kernel_qkv[i], stride_kv[i], padding_kv[i])
        _check_projection(qkv_proj_method[i], sides[i], geometry_q, geometry_kv)
        embed = PatchEmbed(
            channels, dim, patch_size[i], patch_stride[i], patch_padding[i], ln_eps=ln_eps
        )
        blocks = [
            Block(
                dim,
                ConvAttention(
                    dim,
                    num_heads=num_heads[i],
                    method=qkv_proj_method[i],
                    geometry_q=geometry_q,
                    geometry_kv=geometry_kv,
                    with_cls_token=with_cls_token[i],
                    drop_rate=drop_rate[i],
                    attention_drop_rate=attention_drop_rate[i],
                ),
                mlp_ratio=mlp_ratio[i],
                act_layer=QuickGELU,
                ln_eps=ln_eps,
                drop_rate=drop_rate[i],
                drop_path_rate=rate,
            )
            for rate in drop_path_ramp(drop_path_rate[i], depth[i])
        ]
        stages.append(
            Stage(embed, blocks, dim=dim, with_cls_token=with_cls_token[i], drop_rate=drop_rate[i])
        )
    return staged_backbone(
        Pyramid(stages, dim=hidden_dim[-1], num_classes=num_classes, ln_eps=ln_eps),
        family="CvT",
        keys=KEYS,
        hidden_dim=hidden_dim,
        depth=depth,
        sides=sides,
        prefix=[int(token) for token in with_cls_token],
    )


def _check_projection(method: str, side: int, geometry_q: Geometry, geometry_kv: Geometry) -> None:
    """Reject projections that change the number of queries or leave no keys."""
    kernel, stride_q, padding_q = geometry_q
    queries = conv_size(side, *geometry_q)
    if method == "dw_bn" and queries != side:
        raise ValueError(
            f"kernel_qkv {kernel}, stride_q {stride_q} and padding_q {padding_q} turn "
            f"{side} x {side} queries into {queries} x {queries}, which do not fit the residual: "
            "use a stride of 1 and half the (odd) kernel as padding"
        )
    padding_kv = geometry_kv[2]
    if method == "avg" and padding_kv * 2 > kernel:
        raise ValueError(
            f"padding_kv {padding_kv} is more than half of kernel_qkv {kernel}: lower it"
        )
    if method != "linear" and conv_size(side, *geometry_kv) < 1:
        raise ValueError(
            f"kernel_qkv {kernel} does not fit the {side} x {side} map of a stage: lower it, or "
            "raise padding_kv or img_size"
        )
