"""Guides: what gives the training step the maps and class scores to imitate.

Every guide is called as `guide(images, index, view) -> (maps, logits | None)`, so that the step
need not know which it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lg.models.backbone import Backbone
from lg.models.taps import FeatureTaps


class FrozenTeacher(nn.Module):
    """A trained CNN that never changes: no gradients, no new statistics, whatever `train()` is
    called.

    It sees the student's augmented, normalised batch, resized (bilinear, align_corners False) to
    its own image size.

    Attributes:
        model: the CNN.
        feature_dims: channels of the maps it gives, in tap order.
    """

    def __init__(
        self,
        model: Backbone,
        *,
        indices: Sequence[int] = (),
        image_size: int,
        batch_norm: str = "eval",
        with_logits: bool = False,
    ) -> None:
        """Freezes `model`.

        Args:
            model: the trained guide.
            indices: its blocks (stages of a ResNet) whose maps are given.
            image_size: side of the images it sees, pixels.
            batch_norm: `eval` normalises with the stored statistics; `batch` with those of each
                batch, as the published runs did. Neither changes the stored ones.
            with_logits: whether class scores are given too.
        """
        super().__init__()
        if batch_norm not in ("eval", "batch"):
            raise ValueError(f"batch_norm is {batch_norm!r}; allowed: eval, batch.")
        FeatureTaps(model, indices)  # refuses indices that the model does not have
        # Channels last: what convolutions are fastest in, on CPUs and GPUs.
        self.model = model.requires_grad_(False).to(memory_format=torch.channels_last)
        self.indices = tuple(indices)
        self.image_size = image_size
        self.batch_norm = batch_norm
        self.with_logits = with_logits
        self.feature_dims = [model.feature_dims[i] for i in indices]
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays frozen for any `mode`."""
        super().train(False)
        if self.batch_norm == "batch":
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    # Training mode without tracking: batch statistics are used and nothing is
                    # stored.
                    module.training = True
                    module.track_running_stats = False
        return self

    @torch.no_grad()
    def forward(
        self, images: Tensor, index: Tensor | None = None, view: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Images [N, 3, S, S] to the tapped maps [N, C, H, W] and, if asked for, class scores [N,
        K].

        `index` and `view` (which image, which crop) are for guides that replay stored features;
        this one looks at the images.
        """
        size = (self.image_size, self.image_size)
        if tuple(images.shape[2:]) != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        with FeatureTaps(self.model, self.indices) as taps:
            logits = self.model(images.contiguous(memory_format=torch.channels_last))
            maps = taps.maps()
        return maps, logits if self.with_logits else None


class NoTeacher:
    """The guide of unguided training: nothing to imitate."""

    feature_dims: tuple[int, ...] = ()

    def __call__(
        self, images: Tensor, index: Tensor | None = None, view: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        return [], None
