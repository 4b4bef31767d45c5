"""Crops and flips as data, so that stored feature maps can be cropped and flipped the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lg.augment.preprocessing import Preprocessing

# Limits of random resized crops: share of the area, and width / height (or its inverse).
SMALLEST_AREA = 0.08
LARGEST_ASPECT = 4 / 3
BLACK = Preprocessing(image_size=1).black  # normalised with ImageNet's mean


class View(NamedTuple):
    """A crop box in fractions of the image's height and width, followed by a flip.

    A box may extend beyond the image (below 0, above 1), where it is black.
    """

    top: float = 0.0
    left: float = 0.0
    height: float = 1.0
    width: float = 1.0
    flip: bool = False

    def tensor(self) -> Tensor:
        """Return [5], float32: top, left, height, width, flip."""
        return torch.tensor([self.top, self.left, self.height, self.width, float(self.flip)])


def padding(size: int) -> int:
    """Return the width of the black border that the plain recipe adds to a size x size image."""
    return size // 8


def plain_views(size: int, *, shifts: int, mirrored: bool) -> list[View]:
    """Return views that the plain recipe may draw, the whole image first.

    Args:
        size: Side of the images in pixels.
        shifts: Number of evenly spaced shifts per direction: odd, at most 2 * (size // 8) + 1,
            which is all.
        mirrored: Whether to add the flip of each view.

    Raises:
        ValueError: `shifts` is even or out of range.
    """
    most = padding(size)
    if shifts % 2 == 0 or not 1 <= shifts <= 2 * most + 1:
        raise ValueError(
            f"shifts is {shifts}: images of {size} pixels are shifted by up to {most}, so "
            f"set it to an odd number from 1 to {2 * most + 1}"
        )
    half = shifts // 2
    steps = sorted((round(i * most / max(half, 1)) for i in range(-half, half + 1)), key=abs)
    views = [View(top / size, left / size) for top in steps for left in steps]
    return views + [view._replace(flip=True) for view in views if mirrored]


def shifted(images: Tensor, view: View, black: Sequence[float] = BLACK) -> Tensor:
    """Return a view of `plain_views` of normalised images [N, C, S, S], `black` beyond them."""
    size = images.shape[3]
    top, left = round(view.top * size), round(view.left * size)
    if top or left:
        canvas = images.new_tensor(black)[:, None, None].expand_as(images).clone()
        to_rows, to_columns = (slice(max(-s, 0), size - max(s, 0)) for s in (top, left))
        rows, columns = (slice(max(s, 0), size + min(s, 0)) for s in (top, left))
        canvas[:, :, to_rows, to_columns] = images[:, :, rows, columns]
        images = canvas
    return images.flip(3) if view.flip else images
