"""Guides: they give the training step the maps and logits to imitate.

Every guide is called as `guide(images, index, view) -> (maps, logits | None)`; the training step
does not know which one it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lg.guidance.resize import resize
from lg.models.backbone import Backbone
from lg.models.taps import PermanentTaps


class FrozenTeacher(nn.Module):
    """A trained teacher that never changes: no gradients and no new statistics, even in `train()`.

    It sees the student's augmented, normalised batch, resized (bilinear, align_corners False) to
    its own image size and normalised as in the teacher's own training.

    Attributes:
        model: The teacher, usually a CNN.
        feature_dims: Channels of the maps, in tap order.
    """

    _scale: Tensor  # [C, 1, 1]
    _shift: Tensor

    def __init__(
        self,
        model: Backbone,
        *,
        indices: Sequence[int] = (),
        image_size: int,
        batch_norm: str = "eval",
        with_logits: bool = False,
        renormalize: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        """Freeze `model`.

        Args:
            model: The trained teacher.
            indices: Blocks (stages of a ResNet) whose maps to return.
            image_size: Side of the teacher's images, pixels.
            batch_norm: `eval` normalises with the stored statistics; `batch` with those of each
                batch, as in the published runs. Neither changes the stored statistics.
            with_logits: Whether to return logits.
            renormalize: (scale, shift) per channel that normalise the student's images as the
                teacher's own training did; None if that is the same.

        Raises:
            ValueError: `batch_norm` is unknown, or the teacher lacks one of the blocks.
        """
        super().__init__()
        if batch_norm not in ("eval", "batch"):
            raise ValueError(f"batch_norm is {batch_norm!r}; allowed: eval, batch.")
        # Convolutions are fastest in channels_last, on CPUs and GPUs.
        self.model = model.requires_grad_(False).to(memory_format=torch.channels_last)
        self._taps = PermanentTaps(model, indices)
        self.image_size = image_size
        self.batch_norm = batch_norm
        self.with_logits = with_logits
        self.feature_dims = [model.feature_dims[i] for i in indices]
        self._renormalizes = renormalize is not None
        for name, values in zip(("_scale", "_shift"), renormalize or ([1.0], [0.0]), strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay frozen in any `mode`."""
        super().train(False)
        if self.batch_norm == "batch":
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    # Training mode without tracking uses batch statistics and stores nothing.
                    module.training = True
                    module.track_running_stats = False
        return self

    @torch.no_grad()
    def forward(
        self, images: Tensor, index: Tensor | None = None, view: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Map images [N, C, S, S] to the tapped maps [N, C, H, W] and logits [N, K] or None.

        `index` and `view` are for guides that replay stored maps; they are ignored here.
        """
        images = resize(images, (self.image_size, self.image_size))
        if self._renormalizes:
            images = images * self._scale + self._shift
        images = images.contiguous(memory_format=torch.channels_last)
        logits, maps = self._taps.run(self.model, images)
        return maps, logits if self.with_logits else None


class NoGuide:
    """The guide of unguided training: it gives nothing to imitate."""

    def __call__(
        self, images: Tensor, index: Tensor | None = None, view: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        return [], None
