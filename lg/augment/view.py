"""Views: which part of an image was taken, as data, so that stored feature maps can be cropped the
same way."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

# Of random resized crops: share of the image's area, and width over height (or its inverse).
SMALLEST_AREA = 0.08
LARGEST_ASPECT = 4 / 3


class View(NamedTuple):
    """A crop box in fractions of the source image's height and width, then a flip.

    A box may reach beyond the image (below 0, above 1); what lies there is black.
    """

    top: float = 0.0
    left: float = 0.0
    height: float = 1.0
    width: float = 1.0
    flip: bool = False

    def tensor(self) -> Tensor:
        """[5], float32: top, left, height, width, flip."""
        return torch.tensor([self.top, self.left, self.height, self.width, float(self.flip)])


def padding(size: int) -> int:
    """Black pixels that the plain recipe puts on every side of a size x size image."""
    return size // 8


def random_resized_crop(image: Image.Image, size: int, *, hflip: float) -> tuple[Image.Image, View]:
    """Takes 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, resized (bicubic) to size x
    size.

    Draws from the global `random` and torch generators.
    """
    top, left, height, width = RandomResizedCrop.get_params(
        image, scale=[SMALLEST_AREA, 1.0], ratio=[1 / LARGEST_ASPECT, LARGEST_ASPECT]
    )
    flip = random.random() < hflip
    view = View(
        top / image.height, left / image.width, height / image.height, width / image.width, flip
    )
    image = TF.resized_crop(
        image, top, left, height, width, [size, size], InterpolationMode.BICUBIC
    )
    return (ImageOps.mirror(image) if flip else image), view


def padded_crop(image: Image.Image, size: int, *, hflip: float) -> tuple[Image.Image, View]:
    """Resizes (bicubic) to size x size, pads with size/8 of black on every side and takes size x
    size of it.

    Draws from the global `random` generator.
    """
    most = padding(size)
    top, left = random.randint(-most, most), random.randint(-most, most)
    flip = random.random() < hflip
    image = image.resize((size, size), Image.Resampling.BICUBIC).crop(
        (left, top, left + size, top + size)
    )
    return (ImageOps.mirror(image) if flip else image), View(
        top / size, left / size, 1.0, 1.0, flip
    )


def plain_views(size: int, *, shifts: int, mirrored: bool) -> list[View]:
    """Views that the plain recipe may draw, the whole image first.

    Args:
        size: Side of the images, pixels.
        shifts: How many shifts each way, evenly spaced: odd, at most 2 * (size // 8) + 1, which is
            all.
        mirrored: Whether each is there flipped too.

    Raises:
        ValueError: Another number of shifts.
    """
    most = padding(size)
    if shifts % 2 == 0 or not 1 <= shifts <= 2 * most + 1:
        raise ValueError(
            f"{shifts} shifts each way: images of {size} pixels are shifted by up to {most}, so "
            f"give an odd number from 1 to {2 * most + 1}"
        )
    half = shifts // 2
    steps = sorted((round(i * most / max(half, 1)) for i in range(-half, half + 1)), key=abs)
    views = [View(top / size, left / size) for top in steps for left in steps]
    return views + [view._replace(flip=True) for view in views if mirrored]


def shifted(images: Tensor, view: View) -> Tensor:
    """Normalised images [N, 3, S, S] as a view of `plain_views` shows them: black where it reaches
    beyond them."""
    size = images.shape[3]
    top, left = round(view.top * size), round(view.left * size)
    if top or left:
        mean, std = (images.new_tensor(x) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        canvas = (-mean / std)[:, None, None].expand_as(images).clone()
        to_rows, to_columns = (slice(max(-s, 0), size - max(s, 0)) for s in (top, left))
        rows, columns = (slice(max(s, 0), size + min(s, 0)) for s in (top, left))
        canvas[:, :, to_rows, to_columns] = images[:, :, rows, columns]
        images = canvas
    return images.flip(3) if view.flip else images
