"""Views: which part of an image was taken, as data, so that stored feature maps can be cropped the
same way."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF


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


def random_resized_crop(image: Image.Image, size: int, *, hflip: float) -> tuple[Image.Image, View]:
    """Takes 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, resized (bicubic) to size x
    size.

    Draws from the global `random` and torch generators.
    """
    top, left, height, width = RandomResizedCrop.get_params(
        image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3]
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
    padding = size // 8
    top, left = random.randint(-padding, padding), random.randint(-padding, padding)
    flip = random.random() < hflip
    image = image.resize((size, size), Image.Resampling.BICUBIC).crop(
        (left, top, left + size, top + size)
    )
    return (ImageOps.mirror(image) if flip else image), View(
        top / size, left / size, 1.0, 1.0, flip
    )
