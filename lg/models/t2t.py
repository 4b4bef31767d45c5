"""T2T-ViT: a transformer on tokens that aggregate their neighbours in several steps.

Source: Yuan et al., "Tokens-to-Token ViT", arXiv 2101.11986, section 3.1 (tokens to token) and 3.2
(backbone); Performer attention: Choromanski et al., arXiv 2009.14794.
Departure, as in the published code: the attention of a step changes the width of the tokens, so its
residual is the value, not the input.

Shapes: B batch, N tokens, C channels, R random features, H and W the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn

from lg.models.backbone import Backbone, MapLayout
from lg.models.key_table import KeyTable
from lg.models.layers import (
    INIT_STD,
    check_heads,
    drop_path_ramp,
    init_linear,
    stage_sides,
)
from lg.models.wide import widen

KEYS = KeyTable(
    renames=(
        ("layers.{}.attn.qkv", "layers.{}.attn.qkv_transform"),
        ("layers.{}.attn.proj", "layers.{}.attn.projection"),
    ),
)

KERNEL_RATIO = 0.5  # random features of the Performer over its width
_DIVISION_EPS = 1e-8


class PerformerAttention(nn.Module):
    """Attention of one head at linear cost: exp(key . query) estimated by random features.

    Args:
        dim_in: Channels of the incoming tokens.
        dim: Channels of query, key and value, and of the result.
    """

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        num_features = int(dim * KERNEL_RATIO)
        directions = nn.init.orthogonal_(torch.empty(num_features, dim))
        self.w = nn.Parameter(directions * math.sqrt(num_features), requires_grad=False)
        self.qkv_transform = nn.Linear(dim_in, 3 * dim)
        self.projection = nn.Linear(dim, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, dim_in] to [B, N, dim], including the residual."""
        # The order in published weights is key, query, value.
        key, query, value = self.qkv_transform(tokens).chunk(3, dim=-1)
        # Exponentials of squares do not fit half precision.
        with torch.autocast(tokens.device.type, enabled=False):
            exact = torch.promote_types(value.dtype, torch.float32)
            keys, queries = self._features(key.to(exact)), self._features(query.to(exact))
            # Sum over the tokens first, to avoid an N x N matrix.
            summary = keys.transpose(1, 2) @ value.to(exact)  # [B, R, C]
            weight = queries @ keys.sum(dim=1).unsqueeze(-1)  # [B, N, 1]
            attended = (queries @ summary) / (weight + _DIVISION_EPS)
        return value + self.projection(attended.to(value.dtype))

    def _features(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return positive random features [B, N, R]; their inner products estimate exp(x . y)."""
        half_square = vectors.square().sum(dim=-1, keepdim=True) / 2
        scores = vectors @ self.w.to(vectors.dtype).T - half_square
        return scores.exp() / math.sqrt(len(self.w))


class TokenTransformer(nn.Module):
    """One Performer layer between two soft splits."""

    def __init__(self, dim_in: int, dim: int, *, ln_eps: float, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim_in, eps=ln_eps)
        self.attn = PerformerAttention(dim_in, dim)
        self.norm2 = nn.LayerNorm(dim, eps=ln_eps)
        self.mlp = Mlp(dim, hidden_features=dim, drop=drop_rate)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, dim_in] to [B, N, dim]."""
        tokens = self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class TokensToToken(nn.Module):
    """Soft splits (overlapping windows, unfolded) with a token transformer between each two.

    Args:
        splits: Kernel, stride and padding of each split.
        sides: Side of the map after each split.
        in_channels: Channels of the images.
        hidden_dim: Channels of the resulting tokens.
        token_dim: Channels of the tokens between splits.
        ln_eps: Added to the variance in LayerNorm.
        drop_rate: Dropout in the MLPs.
    """

    def __init__(
        self,
        *,
        splits: Sequence[tuple[int, int, int]],
        sides: Sequence[int],
        in_channels: int,
        hidden_dim: int,
        token_dim: int,
        ln_eps: float,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.splits, self.sides = list(splits), list(sides)
        channels = [in_channels, *[token_dim] * (len(self.splits) - 1)]
        widths = [c * kernel**2 for c, (kernel, _, _) in zip(channels, self.splits, strict=True)]
        layer = partial(TokenTransformer, dim=token_dim, ln_eps=ln_eps, drop_rate=drop_rate)
        self.attention = nn.ModuleList(layer(width) for width in widths[:-1])
        self.projection = nn.Linear(widths[-1], hidden_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, C, H, W] to tokens [B, N, hidden_dim]."""
        features = images
        for transformer, split, side in zip(self.attention, self.splits, self.sides, strict=False):
            tokens = transformer(_soft_split(features, *split))
            features = tokens.transpose(1, 2).unflatten(2, (side, -1))
        return self.projection(_soft_split(features, *self.splits[-1]))


def _soft_split(features: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Return the windows of a map [B, C, H, W] as tokens [B, N, C kernel^2]."""
    if not features.is_cuda:
        return F.unfold(features, kernel, stride=stride, padding=padding).transpose(1, 2)
    # There `F.unfold` launches a kernel for every image.
    return _windows(features, kernel, stride, padding)


def _windows(features: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Return what `_soft_split` returns; on CPUs the gradient takes twice as long."""
    padded = F.pad(features, (padding, padding, padding, padding))
    windows = padded.unfold(2, kernel, stride).unfold(3, kernel, stride)  # [B, C, h, w, k, k]
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


class T2TViT(nn.Module):
    """Tokens-to-token module, class token, fixed positions, plain blocks, class token head."""

    num_prefix_tokens = 1  # the class token

    def __init__(
        self,
        t2t_module: TokensToToken,
        blocks: Sequence[nn.Module],
        *,
        hidden_dim: int,
        num_classes: int,
        ln_eps: float,
        drop_rate: float,
    ) -> None:
        super().__init__()
        num_tokens = t2t_module.sides[-1] ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.pos_embed = nn.Parameter(sinusoid(num_tokens, hidden_dim), requires_grad=False)
        self.t2t_module = t2t_module
        self.pos_drop = nn.Dropout(drop_rate)
        self.patch_drop: nn.Module = nn.Identity()
        self.layers = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(hidden_dim, eps=ln_eps)
        self.head = nn.Linear(hidden_dim, num_classes)
        trunc_normal_(self.cls_token, std=INIT_STD)
        self.apply(init_linear)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, C, H, W] to logits [B, K]."""
        tokens = self.t2t_module(images)
        # Not len(): it would fix the batch size of an exported model.
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = self.layers(self.patch_drop(self.pos_drop(tokens + self.pos_embed)))
        return self.head(self.norm(tokens)[:, 0])

    def get_classifier(self) -> nn.Module:
        """Return the classifier, under the name that timm's models use."""
        return self.head


def sinusoid(num_tokens: int, channels: int) -> torch.Tensor:
    """Return fixed positions [1, N, C]: sines in even channels, cosines in odd channels.

    Source: Vaswani et al., arXiv 1706.03762, section 3.5.
    """
    even = torch.arange(channels, dtype=torch.float64) // 2 * 2
    angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] / 10000 ** (even / channels)
    odd = torch.arange(channels) % 2 == 1
    return torch.where(odd, angles.cos(), angles.sin()).float().unsqueeze(0)


def t2t(
    *,
    img_size: int,
    in_channels: int = 3,
    num_classes: int,
    hidden_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    patch_size: int | None = None,
    token_dim: int = 64,
    kernel_size: Sequence[int] = (7, 3, 3),
    stride: Sequence[int] = (4, 2, 2),
    padding: Sequence[int] = (2, 1, 1),
    ln_eps: float = 1e-6,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    attention_drop_rate: float = 0.0,
    wide_last: int = 0,
    lift: int = 0,
) -> Backbone:
    """Return a T2T-ViT with Performer token transformers.

    Args: as in `lg.models.backbone`, for images of any size, and:
        patch_size: Product of the strides; checked if given, it changes nothing.
        token_dim: Channels inside the tokens-to-token module, 2 or more.
        kernel_size: Windows of the soft splits, in pixels of their input; one entry per split.
        stride: Steps of the soft splits.
        padding: Zeros around the input of the soft splits.
        wide_last: See `lg.models.wide`.
        lift: See `lg.models.wide`.
    """
    check_heads([hidden_dim], [num_heads])
    _check_splits(kernel_size, stride, padding, patch_size)
    sides = stage_sides(img_size, kernel_size, stride, padding)
    t2t_module = TokensToToken(
        splits=list(zip(kernel_size, stride, padding, strict=True)),
        sides=sides,
        in_channels=in_channels,
        hidden_dim=hidden_dim,
        token_dim=token_dim,
        ln_eps=ln_eps,
        drop_rate=drop_rate,
    )
    options: dict[str, Any] = dict(
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        qkv_bias=False,
        proj_drop=drop_rate,
        attn_drop=attention_drop_rate,
        norm_layer=partial(nn.LayerNorm, eps=ln_eps),
    )
    ramp = drop_path_ramp(drop_path_rate, depth)
    blocks = [Block(hidden_dim, drop_path=rate, **options) for rate in ramp]
    net = T2TViT(
        t2t_module,
        blocks,
        hidden_dim=hidden_dim,
        num_classes=num_classes,
        ln_eps=ln_eps,
        drop_rate=drop_rate,
    )
    width = widen(
        net,
        net.layers,
        wide_last=wide_last,
        lift=lift,
        hidden_dim=hidden_dim,
        drop_path=ramp[-1],
        **options,
    )
    layout = MapLayout("tokens", hidden_dim, 1, (sides[-1], sides[-1]))
    return Backbone(
        net,
        family="T2TViT",
        keys=KEYS,
        block_names=[f"layers.{index}" for index in range(depth)],
        layouts=[layout] * (depth - 1) + [replace(layout, channels=width)],
    )


def _check_splits(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    patch_size: int | None,
) -> None:
    """Check that the soft splits are complete and agree with `patch_size`."""
    if not len(kernel_size) == len(stride) == len(padding) > 0:
        raise ValueError(
            f"kernel_size {list(kernel_size)}, stride {list(stride)} and padding {list(padding)} "
            "differ in length: give one entry of each for every soft split"
        )
    if patch_size is not None and patch_size != math.prod(stride):
        raise ValueError(
            f"patch_size is {patch_size}, but stride {list(stride)} steps {math.prod(stride)} "
            "pixels in all: make them agree, or set patch_size to null"
        )
