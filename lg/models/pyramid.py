"""What PVT v1 and CvT share: stages of embedded patches and blocks, on ever coarser maps.

Shapes: B batch, N patch tokens, P class tokens (0 or 1), C channels, H and W the map of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import nn

from lg.models.layers import INIT_STD, init_linear, to_tokens

Size = tuple[int, int]  # height and width of a map


class PatchEmbed(nn.Module):
    """Patches, embedded by a convolution and normalised."""

    def __init__(
        self,
        in_channels: int,
        dim: int,
        kernel: int,
        stride: int,
        padding: int = 0,
        *,
        ln_eps: float,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim, eps=ln_eps)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, Size]:
        """Map [B, C, H, W] to tokens [B, N, dim] and the size of their map."""
        patches = self.proj(features)
        return self.norm(to_tokens(patches)), (patches.shape[2], patches.shape[3])


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual under stochastic depth."""

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        *,
        mlp_ratio: float,
        act_layer: type[nn.Module] = nn.GELU,
        ln_eps: float,
        drop_rate: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=ln_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=ln_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        """Map tokens [B, P + N, C] on a map of `size` to [B, P + N, C]."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), size))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class Stage(nn.Module):
    """Patch embedding, optional class token and learned positions, blocks.

    Args:
        patch_embed: The embedding.
        blocks: The blocks.
        dim: C.
        num_patches: N if positions are learned, 0 if there are none.
        with_cls_token: Whether there is a class token.
        drop_rate: Dropout on the embedded tokens.
    """

    def __init__(
        self,
        patch_embed: PatchEmbed,
        blocks: Sequence[nn.Module],
        *,
        dim: int,
        num_patches: int = 0,
        with_cls_token: bool,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.pos_embed, self.cls_token = None, None
        if num_patches:
            self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + with_cls_token, dim))
            trunc_normal_(self.pos_embed, std=INIT_STD)
        if with_cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            trunc_normal_(self.cls_token, std=INIT_STD)
        self.patch_embed = patch_embed
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map [B, C, H, W] to the next map and the class token [B, 1, C], if there is one."""
        tokens, size = self.patch_embed(features)
        if self.cls_token is not None:
            # Not len(): it would fix the batch size of an exported model.
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        tokens = self.pos_drop(tokens)
        for block in self.blocks:
            tokens = block(tokens, size)
        cls_token = None
        if self.cls_token is not None:
            cls_token, tokens = tokens[:, :1], tokens[:, 1:]
        return tokens.transpose(1, 2).unflatten(2, size), cls_token


class Pyramid(nn.Module):
    """The stages, one final norm, and a head on the last stage's class token.

    Without a class token in the last stage, the head takes the mean of its patch tokens.
    """

    def __init__(
        self, stages: Sequence[Stage], *, dim: int, num_classes: int, ln_eps: float
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dim, eps=ln_eps)
        self.head = nn.Linear(dim, num_classes)
        self.apply(init_linear)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, C, H, W] to logits [B, K]."""
        features, cls_token = images, None
        for stage in self.stages:
            features, cls_token = stage(features)
        tokens = to_tokens(features) if cls_token is None else cls_token
        return self.head(self.norm(tokens).mean(dim=1))

    def get_classifier(self) -> nn.Module:
        """Return the classifier, under the name that timm's models use."""
        return self.head
