"""Training on a random part of the patches, and the positions that are left.

Source: Liu et al., "PatchDropout", arXiv 2208.07220.

Shapes: B batch, N patch tokens, K kept ones, C channels.
"""

from __future__ import annotations

import torch
from timm.layers import PatchDropoutWithIndices
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lg.models.backbone import Backbone
from lg.models.t2t import T2TViT


class PatchDrop(nn.Module):
    """Drop random patch tokens of each image in training, never the class token.

    Attributes:
        kept: [B, K], positions of the tokens that the last pass kept, in rising order; None if it
            kept all, as evaluation does.
    """

    def __init__(self, rate: float, num_prefix_tokens: int) -> None:
        """Create the layer.

        Args:
            rate: Share of the patches to drop, (0, 1); at least one patch is kept.
            num_prefix_tokens: Class and distillation tokens in front of the patches.
        """
        super().__init__()
        self.layer = PatchDropoutWithIndices(rate, num_prefix_tokens, ordered=True)
        self.kept: torch.Tensor | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, P + N, C] to [B, P + K, C] in training."""
        tokens, self.kept = self.layer(tokens)
        return tokens


def drop_patches(model: Backbone, rate: float) -> None:
    """Let a model drop patches in training, after positions are added, in place.

    Raises:
        ValueError: Its blocks need all patches.
    """
    net = model.net
    if not isinstance(net, (VisionTransformer, T2TViT)):
        raise ValueError(
            f"this {model.family} model needs all patches (DeiT, T2TViT and timm's "
            "VisionTransformer work with a subset)"
        )
    net.patch_drop = PatchDrop(rate, net.num_prefix_tokens)
