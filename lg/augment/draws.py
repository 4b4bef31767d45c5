"""Draw the random parameters of augmentation, with the distributions of timm and torchvision.

What is drawn for an image depends on the seed, the epoch and the index of the image alone. Each
image gets one row of independent uniform numbers; the functions below turn columns into parameters.

Letters in shapes: N images, A attempts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lg.augment import randaugment
from lg.augment.view import LARGEST_ASPECT, SMALLEST_AREA, padding

_ATTEMPTS = 10  # draws of a box before the fallback, as in torchvision and timm
_ERASE_PROBABILITY = 0.25
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)

# Uniform numbers per image.
CROP_UNIFORMS = 2 * _ATTEMPTS + 2  # shapes of all attempts, then a position
ERASE_UNIFORMS = CROP_UNIFORMS + 1  # likewise, then whether to erase
_LAYERS = 2  # of RandAugment
_PARTS = (1, CROP_UNIFORMS, _LAYERS * randaugment.UNIFORMS, ERASE_UNIFORMS, 1)


class Draws(NamedTuple):
    """Random parameters of N images, in host memory."""

    box: np.ndarray  # [N, 4], int64: top, left, height, width in pixels
    flip: np.ndarray  # [N], bool
    operations: randaugment.Operations | None  # None in the plain recipe
    erased: np.ndarray  # [N, 4], int64: boxes in the result; height 0 erases nothing
    noise: np.ndarray  # [N], 0 to 1: selects the noise in the erased box

    def views(self, heights: np.ndarray, widths: np.ndarray) -> Tensor:
        """Return the views [N, 5] of images of these sizes, see `lg.augment.view.View`."""
        sizes = np.stack([heights, widths, heights, widths], axis=1)
        columns = np.concatenate([self.box / sizes, self.flip[:, None]], axis=1)
        return torch.from_numpy(columns.astype(np.float32))


def uniforms(seed: int, epochs: Iterable[int], index: Iterable[int]) -> np.ndarray:
    """Return independent numbers between 0 and 1, exclusive, one row per image.

    Args:
        seed: Of the run, 0..2^64-1.
        epochs: N numbers, counted from 0.
        index: N positions of images in the full data set.
    """
    # A counter-based generator: its state is the position in a stream that is fixed by the key.
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
    state = generator.state
    rows = []
    for epoch, number in zip(epochs, index, strict=True):
        state["state"]["counter"][:] = 0, number, epoch, 0
        generator.state = state
        rows.append(generator.random_raw(sum(_PARTS)))
    bits = np.array(rows, dtype=np.uint64).reshape(len(rows), sum(_PARTS))
    return ((bits >> np.uint64(12)) + 0.5) * 2.0**-52


def draw_strong(
    heights: np.ndarray, widths: np.ndarray, numbers: np.ndarray, *, size: int, hflip: float
) -> Draws:
    """Draw the strong recipe: random resized crop, flip, RandAugment, erased box.

    Args:
        heights: [N], of the images in pixels.
        widths: [N].
        numbers: Of `uniforms`.
        size: Side of the result in pixels.
        hflip: Probability of a flip.
    """
    flip, crop, operations, erased, noise = np.split(numbers, np.cumsum(_PARTS[:-1]), axis=1)
    return Draws(
        draw_crops(heights, widths, crop),
        flip[:, 0] < hflip,
        randaugment.draw(operations.reshape(len(numbers), _LAYERS, randaugment.UNIFORMS)),
        draw_erased(size, erased),
        noise[:, 0],
    )


def draw_plain(numbers: np.ndarray, *, size: int, hflip: float) -> Draws:
    """Draw the plain recipe for images of size x size: a shift by whole pixels, and a flip."""
    most = padding(size)
    corner = np.floor(numbers[:, 1:3] * (2 * most + 1)).astype(np.int64) - most
    box = np.concatenate([corner, np.full_like(corner, size)], axis=1)
    none = np.zeros(len(box))
    return Draws(box, numbers[:, 0] < hflip, None, np.zeros_like(box), none)


def draw_crops(heights: np.ndarray, widths: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Draw boxes [N, 4] of random resized crops as torchvision does.

    A box covers 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3 (uniform logarithm) and a
    uniform position. The first of ten attempts that fits into the image is used, or else the
    largest central box of an allowed ratio.

    Args:
        heights: [N], of the images in pixels.
        widths: [N].
        numbers: [N, CROP_UNIFORMS].
    """
    area, aspect, place = np.split(numbers.T, [_ATTEMPTS, 2 * _ATTEMPTS])
    area = heights * widths * (SMALLEST_AREA + (1 - SMALLEST_AREA) * area)
    aspect = np.exp(np.log(LARGEST_ASPECT) * (2 * aspect - 1))
    height, width = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (height > 0) & (height <= heights) & (width > 0) & (width <= widths)
    # If none fits: the whole image, cropped to an allowed ratio.
    last_height = np.minimum(heights, np.rint(widths * LARGEST_ASPECT))
    last_width = np.minimum(widths, np.rint(heights * LARGEST_ASPECT))
    height, width = _first(fits, (height, width), (last_height, last_width))
    central = ~fits.any(axis=0)
    place = np.where(central, 0.5, place)
    room = np.stack([heights - height, widths - width])
    corner = np.floor(place * (room + ~central))
    return np.stack([*corner, height, width], axis=1).astype(np.int64)


def draw_erased(size: int, numbers: np.ndarray) -> np.ndarray:
    """Draw boxes [N, 4] of random erasing as timm does; height 0 erases nothing.

    With probability 1/4 a box covers 2 to 33 % of the area at an aspect ratio of 0.3 to 3.3
    (uniform logarithm). The first of ten attempts that is smaller than the image in both directions
    is used.

    Args:
        size: Side of the images in pixels.
        numbers: [N, ERASE_UNIFORMS].
    """
    *shape_and_place, chance = np.split(numbers.T, np.cumsum([_ATTEMPTS, _ATTEMPTS, 2]))
    area, aspect, place = shape_and_place
    (smallest, largest), (low, high) = _ERASED_AREA, np.log(_ERASED_ASPECT)
    area = size * size * (smallest + (largest - smallest) * area)
    aspect = np.exp(low + (high - low) * aspect)
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (height < size) & (width < size)
    nothing = np.zeros(len(numbers))
    height, width = _first(fits, (height, width), (nothing, nothing))
    height[chance[0] >= _ERASE_PROBABILITY] = 0
    room = np.stack([size - height, size - width])
    corner = np.floor(place * (room + 1))
    return np.stack([*corner, height, width], axis=1).astype(np.int64)


def _first(
    fits: np.ndarray, attempts: Sequence[np.ndarray], fallbacks: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Select from attempts [A, N] the first that fits, [N], or else the fallback."""
    number, found = fits.argmax(axis=0), fits.any(axis=0)
    columns = np.arange(fits.shape[1])
    return [
        np.where(found, attempt[number, columns], fallback)
        for attempt, fallback in zip(attempts, fallbacks, strict=True)
    ]
