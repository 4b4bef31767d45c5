"""The tone operations of RandAugment on gray float images, without rounding to 256 levels.

Equal to the lookup tables of `lg.augment.operations` on whole levels, up to their truncation.

Letters in shapes: n samples, S side.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

_BINS = 256


def prepare_levels(
    names: list[str], level: np.ndarray, size: int, channels: int
) -> list[np.ndarray]:
    """Return the levels of the operations, [n, 1, 1, 1]."""
    return [level[:, None, None, None].astype(np.float32)]


def apply_tones(images: Tensor, names: list[str], fill: tuple[float, ...], level: Tensor) -> Tensor:
    """Apply an operation to each image, [n, 1, S, S] from 0 to 255; equal names are together."""
    parts, first = [], 0
    for name, group in groupby(names):
        last = first + len(list(group))
        parts.append(_TONES[name](images[first:last], level[first:last]))
        first = last
    return torch.cat(parts).clamp_(0, 255)


def _autocontrast(pixels: Tensor, level: Tensor) -> Tensor:
    low, high = _range(pixels)
    return torch.where(high > low, (pixels - low) * (255 / (high - low)), pixels)


def _equalize(pixels: Tensor, level: Tensor) -> Tensor:
    """Map each pixel to its rank, interpolated within 256 bins of the image's own range."""
    low, high = _range(pixels)
    place = (pixels - low) * (_BINS / (high - low)).nan_to_num(0, 0, 0)
    index = place.long().clamp_(max=_BINS - 1)
    counts = torch.zeros(len(pixels), _BINS, device=pixels.device)
    flat = index.flatten(1)
    counts.scatter_add_(1, flat, torch.ones((), device=pixels.device).expand(flat.shape))
    below = counts.cumsum(1) - counts
    inside = (place - index).flatten(1) * counts.gather(1, flat)
    ranks = (below.gather(1, flat) + inside).view_as(pixels)
    equal = ranks * (255 / (pixels.shape[2] * pixels.shape[3]))
    return torch.where(high > low, equal, pixels)


def _contrast(pixels: Tensor, level: Tensor) -> Tensor:
    middle = pixels.mean((2, 3), keepdim=True)
    return middle + level * (pixels - middle)


def _posterize(pixels: Tensor, level: Tensor) -> Tensor:
    step = 2 ** (8 - level)
    return (pixels / step).floor() * step


def _solarize_add(pixels: Tensor, level: Tensor) -> Tensor:
    return torch.where(pixels < 128, pixels + level, pixels)


def _range(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest pixel of each image, [n, 1, 1, 1]."""
    low, high = pixels.flatten(1).aminmax(dim=1)
    return low[:, None, None, None], high[:, None, None, None]


_TONES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "ContrastIncreasing": _contrast,
    "Invert": lambda pixels, level: 255 - pixels,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": lambda pixels, level: torch.where(pixels < level, pixels, 255 - pixels),
    "SolarizeAdd": _solarize_add,
    "BrightnessIncreasing": lambda pixels, level: pixels * level,
}
