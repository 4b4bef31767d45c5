"""Label smoothing, mixup and CutMix on batches."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Mixing:
    """Convert labels to target distributions and optionally mix pairs of neighbouring images.

    If both alphas are above 0, each batch uses mixup or CutMix with equal probability. All draws
    come from the given generator, on the host, and hold for the whole batch. Images 0 and 1 are
    mixed with each other, 2 and 3, and so on: the order of a batch is random, and so the result
    does not depend on how a batch is split over processes. A last image without a neighbour is
    mixed with itself.

    Source: mixup: arXiv 1710.09412; CutMix: arXiv 1905.04899; smoothing: arXiv 1512.00567.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ) -> None:
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha

    def __call__(
        self, images: Tensor, labels: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mix images [N, C, S, S] with labels [N].

        Returns:
            The mixed images, and targets [N, K] whose rows sum to 1.
        """
        targets = F.one_hot(labels, self.num_classes).to(images.dtype)
        targets = targets * (1 - self.smoothing) + self.smoothing / self.num_classes
        cutmix = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or rng.random() < 0.5)
        alpha = self.cutmix_alpha if cutmix else self.mixup_alpha
        if alpha == 0:
            return images, targets
        share = float(rng.beta(alpha, alpha))  # of the original image
        if cutmix:
            images, share = _paste_box(images, share, rng)
        else:
            images = torch.lerp(_partners(images), images, share)
        return images, torch.lerp(_partners(targets), targets, share)


def _partners(values: Tensor) -> Tensor:
    """Return values [N, ...] with neighbours exchanged: 1, 0, 3, 2, ..."""
    even = len(values) // 2 * 2
    exchanged = values[:even].unflatten(0, (even // 2, 2)).flip(1).flatten(0, 1)
    return exchanged if even == len(values) else torch.cat([exchanged, values[even:]])


def _paste_box(images: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Paste one box of their partners, about 1 - share of the area, into images.

    Returns:
        The images and the true share of the originals.
    """
    height, width = images.shape[2:]
    side = np.sqrt(1 - share)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    pasted = images.clone()
    pasted[:, :, top:bottom, left:right] = _partners(images[:, :, top:bottom, left:right])
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)
