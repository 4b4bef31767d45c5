"""CvT: stages of convolutional token embedding and attention with convolutional projections.

Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", arXiv 2103.15808, section
3.1 (embedding) and 3.2 (projection).
Departures, as in the published code: scores are divided by the root of the full width, not of a
head's width, and the MLP's activation is x * sigmoid(1.702 x).

Shapes: B batch, N patch tokens, P class tokens (0 or 1), C channels, H and W the map of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import DropPath, Mlp, QuickGELU, trunc_normal_
from torch import nn

from lg.models.backbone import Backbone
from lg.models.key_table import KeyTable
from lg.models.layers import (
    INIT_STD,
    attend,
    check_depth,
    check_widths,
    conv_size,
    drop_path_ramp,
    init_linear,
    pyramid,
    smallest_image,
    to_tokens,
)

KEYS = KeyTable(renames=(("stages.{}", "stage{}"),))
PROJECTIONS = ("dw_bn", "avg", "linear")
Size = tuple[int, int]  # height and width of a map


class DepthwiseProjection(nn.Module):
    """Depthwise convolution and BatchNorm: what comes before a `dw_bn` projection."""

    def __init__(self, dim: int, *, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            dim, dim, kernel, stride=stride, padding=padding, groups=dim, bias=False
        )
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """A map [B, C, H, W] to one of the same or a smaller size."""
        return self.bn(self.conv(features))


def _projection(method: str, dim: int, kernel: int, stride: int, padding: int) -> nn.Module:
    """Return what a map goes through before it is projected."""
    if method == "dw_bn":
        return DepthwiseProjection(dim, kernel=kernel, stride=stride, padding=padding)
    if method == "avg":
        return nn.AvgPool2d(kernel, stride=stride, padding=padding, ceil_mode=True)
    return nn.Identity()


class ConvAttention(nn.Module):
    """Attention whose queries, keys and values are convolved before their linear projections."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_proj_method: str,
        kernel_qkv: int,
        stride_q: int,
        padding_q: int,
        stride_kv: int,
        padding_kv: int,
        with_cls_token: bool,
        drop_rate: float,
        attention_drop_rate: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = dim**-0.5
        self.num_prefix = int(with_cls_token)
        self.attention_drop_rate = attention_drop_rate
        # Averaged queries would be fewer than the tokens: that method leaves them as they are.
        query_method = "linear" if qkv_proj_method == "avg" else qkv_proj_method
        self.conv_proj_q = _projection(query_method, dim, kernel_qkv, stride_q, padding_q)
        self.conv_proj_k = _projection(qkv_proj_method, dim, kernel_qkv, stride_kv, padding_kv)
        self.conv_proj_v = _projection(qkv_proj_method, dim, kernel_qkv, stride_kv, padding_kv)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, dim)
        self.proj_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        """Tokens [B, P + N, C] of a map of `size` to [B, P + N, C]."""
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


class CvTBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual under stochastic depth."""

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float,
        ln_eps: float,
        drop_rate: float,
        drop_path_rate: float,
        attention: nn.Module,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=ln_eps)
        self.attn = attention
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim, eps=ln_eps)
        self.mlp = Mlp(
            dim, hidden_features=int(dim * mlp_ratio), act_layer=QuickGELU, drop=drop_rate
        )

    def forward(self, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        """Tokens [B, P + N, C] of a map of `size` to [B, P + N, C]."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), size))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class ConvEmbed(nn.Module):
    """Overlapping patches, embedded and normalised."""

    def __init__(
        self, in_channels: int, dim: int, *, kernel: int, stride: int, padding: int, ln_eps: float
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim, eps=ln_eps)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, Size]:
        """A map [B, C, H, W] to tokens [B, N, dim] and the size of their map."""
        patches = self.proj(features)
        return self.norm(to_tokens(patches)), (patches.shape[2], patches.shape[3])


class CvTStage(nn.Module):
    """Convolutional embedding, perhaps a class token, blocks; there are no positions."""

    def __init__(
        self,
        patch_embed: ConvEmbed,
        blocks: Sequence[CvTBlock],
        *,
        dim: int,
        with_cls_token: bool,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if with_cls_token else None
        self.patch_embed = patch_embed
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(blocks)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=INIT_STD)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A map [B, C, H, W] to the next map and the class token [B, 1, C], if there is one."""
        tokens, size = self.patch_embed(features)
        num_prefix = 0
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
            num_prefix = 1
        tokens = self.pos_drop(tokens)
        for block in self.blocks:
            tokens = block(tokens, size)
        patches = tokens[:, num_prefix:].transpose(1, 2).unflatten(2, size)
        return patches, tokens[:, :1] if num_prefix else None


class ConvolutionalVisionTransformer(nn.Module):
    """The stages, one final norm, and a head on the last stage's class token.

    Without a class token in the last stage, on the mean of its patch tokens.
    """

    def __init__(
        self, stages: Sequence[CvTStage], *, dim: int, num_classes: int, ln_eps: float
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dim, eps=ln_eps)
        self.head = nn.Linear(dim, num_classes)
        self.apply(init_linear)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] to logits [B, K]."""
        features, cls_token = images, None
        for stage in self.stages:
            features, cls_token = stage(features)
        tokens = to_tokens(features) if cls_token is None else cls_token
        return self.head(self.norm(tokens).mean(dim=1))

    def get_classifier(self) -> nn.Module:
        """The classifier, by the name timm's models give it."""
        return self.head


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
    """Return a CvT; sequences hold one entry a stage.

    Args:
        img_size: Height and width of the images in pixels.
        in_channels: Channels of the images.
        num_classes: K.
        patch_size: Kernel of the embedding, in pixels of the stage's input.
        patch_stride: Stride of the embedding.
        patch_padding: Zeros around the embedding's input.
        hidden_dim: Channels, multiples of `num_heads`.
        depth: Number of blocks, 1 or more.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP over the channels.
        with_cls_token: Whether the stage has a class token. The last one's feeds the head; those of
            earlier stages end with their stage.
        qkv_proj_method: `dw_bn` (depthwise convolution, BatchNorm), `avg` (average pooling of keys
            and values) or `linear` (neither) before the linear projections.
        kernel_qkv: Kernel of these convolutions or poolings.
        stride_kv: Stride for keys and values.
        stride_q: Stride for queries; with the kernel and padding it must keep the size.
        padding_kv: Zeros around keys and values.
        padding_q: Zeros around queries.
        ln_eps: Added to the variance in LayerNorm.
        drop_rate: Dropout on the embedded tokens, after the projection of the attention and in the
            MLP.
        drop_path_rate: Stochastic depth of the stage's last block; rises linearly from 0 at its
            first.
        attention_drop_rate: Dropout on the attention weights.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    check_widths(hidden_dim, num_heads)
    check_depth(depth)
    sides = _sides(img_size, patch_size, patch_stride, patch_padding)
    inputs = [in_channels, *hidden_dim]
    stages = []
    for i, dim in enumerate(hidden_dim):
        attention = partial(
            ConvAttention,
            dim,
            num_heads=num_heads[i],
            qkv_proj_method=qkv_proj_method[i],
            kernel_qkv=kernel_qkv[i],
            stride_q=stride_q[i],
            padding_q=padding_q[i],
            stride_kv=stride_kv[i],
            padding_kv=padding_kv[i],
            with_cls_token=with_cls_token[i],
            drop_rate=drop_rate[i],
            attention_drop_rate=attention_drop_rate[i],
        )
        _check_projection(attention.keywords, sides[i])
        block = partial(
            CvTBlock, dim, mlp_ratio=mlp_ratio[i], ln_eps=ln_eps, drop_rate=drop_rate[i]
        )
        embed = ConvEmbed(
            inputs[i],
            dim,
            kernel=patch_size[i],
            stride=patch_stride[i],
            padding=patch_padding[i],
            ln_eps=ln_eps,
        )
        stages.append(
            CvTStage(
                embed,
                [
                    block(attention=attention(), drop_path_rate=rate)
                    for rate in drop_path_ramp(drop_path_rate[i], depth[i])
                ],
                dim=dim,
                with_cls_token=with_cls_token[i],
                drop_rate=drop_rate[i],
            )
        )
    net = ConvolutionalVisionTransformer(
        stages, dim=hidden_dim[-1], num_classes=num_classes, ln_eps=ln_eps
    )
    prefix = [int(has_token) for has_token in with_cls_token]
    return pyramid(
        net, family="CvT", keys=KEYS, hidden_dim=hidden_dim, depth=depth, sides=sides, prefix=prefix
    )


def _sides(
    img_size: int,
    patch_size: Sequence[int],
    patch_stride: Sequence[int],
    patch_padding: Sequence[int],
) -> list[int]:
    """Return the side of each stage's map."""

    def sides_of(size: int) -> list[int]:
        sides = []
        for kernel, stride, padding in zip(patch_size, patch_stride, patch_padding, strict=True):
            size = conv_size(size, kernel=kernel, stride=stride, padding=padding)
            sides.append(size)
        return sides

    if min(sides_of(img_size)) < 1:
        raise ValueError(
            f"MODEL.IMG_SIZE {img_size} is too small for TRANSFORMER.PATCH_SIZE {list(patch_size)} "
            f"and TRANSFORMER.PATCH_STRIDE {list(patch_stride)}: "
            f"{smallest_image(lambda size: min(sides_of(size)) >= 1)}"
        )
    return sides_of(img_size)


def _check_projection(attention: dict, side: int) -> None:
    """Refuse convolutions of queries that change the map, and of keys that leave nothing."""
    method, kernel = attention["qkv_proj_method"], attention["kernel_qkv"]
    if method not in PROJECTIONS:
        raise ValueError(f"CVT.QKV_PROJ_METHOD {method!r}: use {', '.join(PROJECTIONS)}")
    if method == "linear":
        return
    stride_q, padding_q = attention["stride_q"], attention["padding_q"]
    queries = conv_size(side, kernel=kernel, stride=stride_q, padding=padding_q)
    if method == "dw_bn" and queries != side:
        raise ValueError(
            f"CVT.KERNEL_QKV {kernel}, CVT.STRIDE_Q {stride_q} and CVT.PADDING_Q {padding_q} turn "
            f"{side} x {side} queries into {queries} x {queries}, which do not fit the residual: "
            "use stride 1 and half the (odd) kernel as padding"
        )
    padding_kv = attention["padding_kv"]
    if padding_kv * 2 > kernel and method == "avg":
        raise ValueError(
            f"CVT.PADDING_KV {padding_kv} is more than half of CVT.KERNEL_QKV {kernel}: lower it"
        )
    if side + 2 * padding_kv < kernel:
        raise ValueError(
            f"CVT.KERNEL_QKV {kernel} does not fit the {side} x {side} map of a stage: lower it, "
            "or raise CVT.PADDING_KV or MODEL.IMG_SIZE"
        )
