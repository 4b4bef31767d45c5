"""RandAugment as in timm (`rand-m9-mstd0.5-inc1`), on batches of tensors.

The host draws the operations. Each layer gathers the samples of one kind of operation, processes
them together and puts them back, without waiting for the device.

Letters in shapes: L layers, N samples of a batch, S side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from lg.augment.operations import FILL, GRAY_KINDS, KINDS, Fill, Kind
from lg.device import to_device_together

OPERATIONS = (  # in timm's order
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
TOP_MAGNITUDE = 10.0
UNIFORMS = 4  # random numbers per sample and layer


class Operations(NamedTuple):
    """The operations of each sample of a batch.

    Attributes:
        operation: [L, N], int64: position in OPERATIONS; -1 does not change the sample.
        level: [L, N], float64: argument of timm's operation: degrees, shear factor, shift as a
            fraction of the side, enhancement factor, bits to keep, threshold, or amount to add;
            0 if it has none.
    """

    operation: np.ndarray
    level: np.ndarray


def draw(
    numbers: np.ndarray,
    *,
    magnitude: float = 9.0,
    spread: float = 0.5,
    probability: float = 0.5,
) -> Operations:
    """Draw the operations of each sample, with replacement.

    Args:
        numbers: [N, L, UNIFORMS], independent and uniform between 0 and 1, exclusive.
        magnitude: Mean of the magnitude, 0 to 10.
        spread: Standard deviation of the magnitude, which is clipped to 0 to 10.
        probability: Probability that a drawn operation is applied.

    Source: arXiv 1909.13719; magnitudes and levels as in timm.data.auto_augment.
    """
    choice, chance, normal, side = numbers.T  # [L, N] each
    shape = choice.shape
    operation = (choice * len(OPERATIONS)).astype(np.int64)
    applied = chance < probability
    strength = (magnitude + spread * ndtri(normal)).clip(0, TOP_MAGNITUDE) / TOP_MAGNITUDE
    sign = np.where(side < 0.5, -1.0, 1.0)
    level = np.zeros(shape)
    for number, name in enumerate(OPERATIONS):
        at = operation == number
        level[at] = _levels(name, strength[at], sign[at])
    return Operations(np.where(applied, operation, -1), np.where(applied, level, 0.0))


def _levels(name: str, strength: np.ndarray, sign: np.ndarray) -> np.ndarray | float:
    """Return the arguments for strengths of 0 to 1; whole numbers are truncated, not rounded."""
    match name:
        case "Rotate":
            return sign * strength * 30
        case "ShearX" | "ShearY":
            return sign * strength * 0.3
        case "TranslateXRel" | "TranslateYRel":
            return sign * strength * 0.45
        case "PosterizeIncreasing":
            return 4 - np.floor(strength * 4)
        case "SolarizeIncreasing":
            return 256 - np.floor(strength * 256)
        case "SolarizeAdd":
            return np.floor(strength * 110)
        case _ if name.endswith("Increasing"):
            return np.maximum(1 + sign * strength * 0.9, 0.1)
    return 0.0


def randaugment(images: Tensor, draws: Operations, fill: Fill = FILL) -> Tensor:
    """Apply the drawn operations, layer by layer.

    Args:
        images: [N, 3, S, S] of uint8, or [N, 1, S, S] of float32 from 0 to 255, on any device. Not
            modified.
        draws: The operations of these N samples.
        fill: Pixel of uncovered areas, 0 to 255 per channel.

    Returns:
        Images of the same shape and type, on the same device.
    """
    size, is_gray = images.shape[-1], images.dtype == torch.float32
    channels = 1 if is_gray else 3
    assert images.dtype in (torch.uint8, torch.float32), images.dtype
    assert images.shape[1:] == (channels, size, size), images.shape
    images = images.clone(memory_format=torch.contiguous_format)
    groups = [
        group
        for layer in zip(draws.operation, draws.level, strict=True)
        for group in _groups(*layer, size, channels)
    ]
    moved = iter(to_device_together([a for group in groups for a in group.arrays], images.device))
    for group in groups:
        index, *arguments = (next(moved) for _ in group.arrays)
        picked = images.index_select(0, index)
        images.index_copy_(0, index, group.kind.apply(picked, group.names, fill, *arguments))
    return images


class _Group(NamedTuple):
    """The samples of one kind in one layer."""

    kind: Kind
    names: list[str]
    arrays: list[np.ndarray]  # their positions in the batch; what the kind needs


def _groups(operation: np.ndarray, level: np.ndarray, size: int, channels: int) -> Iterator[_Group]:
    """Sort the samples of a layer into kinds, in the order of their names."""
    for kind in GRAY_KINDS if channels == 1 else KINDS:
        place = np.full(len(OPERATIONS) + 1, len(kind.names))  # the last entry is for -1
        place[[OPERATIONS.index(name) for name in kind.names]] = np.arange(len(kind.names))
        order = place[operation]
        chosen = np.argsort(order, kind="stable")[: np.count_nonzero(order < len(kind.names))]
        if len(chosen) > 0:
            names = [kind.names[k] for k in order[chosen]]
            yield _Group(kind, names, [chosen, *kind.prepare(names, level[chosen], size, channels)])
