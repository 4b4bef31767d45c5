"""The training and test transforms on whole batches, on any device.

The draws are made on the host, for a whole batch at once, and follow timm's and torchvision's
distributions; the pixels never leave the device. The order is that of `lg.augment.recipe`: a random
view, RandAugment, normalise, random erasing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from lg.augment import randaugment
from lg.augment.resample import crop_and_resize
from lg.augment.view import LARGEST_ASPECT, SMALLEST_AREA, padding
from lg.device import to_device

_ATTEMPTS = 10  # draws of a box before the next best is taken, as torchvision and timm have it
_ERASE_PROBABILITY = 0.25
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)


class Draws(NamedTuple):
    """What was drawn for N images, in host memory."""

    box: np.ndarray  # [N, 4], top, left, height, width in pixels
    flip: np.ndarray  # [N], bool
    operations: randaugment.Draws | None  # of RandAugment
    erased: np.ndarray  # [N, 4], boxes in the result; of no height where nothing is
    noise: int  # seed of what they are filled with


class BatchTransform:
    """Training batches: what `TrainTransform` does to one image, done to many at once."""

    def __init__(self, *, image_size: int, strong: bool, hflip: float = 0.5) -> None:
        self.image_size, self.strong, self.hflip = image_size, strong, hflip

    def prepare(self, image: Image.Image) -> Image.Image:
        """The form in which an image is kept.

        The plain recipe starts with a resize, which is done here once. The strong one takes crops
        of any size: images so large that the smallest crop, at its most oblong, is still larger
        than the result in both directions are shrunk until it just is.
        """
        size = self.image_size
        if not self.strong:
            return image.resize((size, size), Image.Resampling.BICUBIC)
        needed = size / (SMALLEST_AREA / LARGEST_ASPECT) ** 0.5  # of the root of the area
        shrinking = needed / (image.width * image.height) ** 0.5
        if shrinking >= 1:
            return image
        sides = (max(1, round(side * shrinking)) for side in image.size)
        return image.resize(tuple(sides), Image.Resampling.BICUBIC)

    def draw(self, heights: np.ndarray, widths: np.ndarray, rng: np.random.Generator) -> Draws:
        """Draws for a batch of N images as they are kept, from their sizes [N] in pixels."""
        count, size = len(heights), self.image_size
        flip = rng.random(count) < self.hflip
        if not self.strong:
            most = padding(size)
            corner = rng.integers(-most, most + 1, (count, 2))
            box = np.concatenate([corner, np.full((count, 2), size)], axis=1)
            return Draws(box, flip, None, np.zeros((count, 4), np.int64), 0)
        return Draws(
            draw_crops(heights, widths, rng),
            flip,
            randaugment.draw(count, rng=rng),
            draw_erased(count, size, rng),
            int(rng.integers(2**62)),
        )

    def apply(self, images: Tensor | Sequence[Tensor], draws: Draws) -> Tensor:
        """Images as they are kept ([H, W, 3], uint8) to [N, 3, S, S], float32, normalised."""
        size = self.image_size
        if draws.operations is None:
            assert isinstance(images, Tensor), "the plain recipe keeps images of one size"
            return normalise(_shift(images, draws))
        pixels = crop_and_resize(images, draws.box, size, draws.flip)
        pixels = randaugment.randaugment(pixels, draws.operations)
        return erase(normalise(pixels), draws.erased, draws.noise)


class BatchTestTransform:
    """Test batches: the whole of every image, resized and normalised."""

    def __init__(self, *, image_size: int) -> None:
        self.image_size = image_size

    def prepare(self, image: Image.Image) -> Image.Image:
        """Small images are kept small, large or very oblong ones in the size they are tested in."""
        size = self.image_size
        if image.width * image.height <= size * size and max(image.size) <= 4 * size:
            return image
        return image.resize((size, size), Image.Resampling.BICUBIC)

    def apply(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Images as they are kept ([H, W, 3], uint8) to [N, 3, S, S], float32, normalised."""
        boxes = np.array([[0, 0, *image.shape[:2]] for image in images])
        flip = np.zeros(len(boxes), dtype=bool)
        return normalise(crop_and_resize(images, boxes, self.image_size, flip))


def views(draws: Draws, heights: np.ndarray, widths: np.ndarray) -> Tensor:
    """[N, 5], the views that were drawn of images of these sizes, see `lg.augment.view.View`."""
    sizes = np.stack([heights, widths, heights, widths], axis=1)
    columns = np.concatenate([draws.box / sizes, draws.flip[:, None]], axis=1)
    return torch.from_numpy(columns.astype(np.float32))


def draw_crops(heights: np.ndarray, widths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Boxes [N, 4] of random resized crops, drawn as torchvision does.

    8 to 100 % of the area at an aspect ratio of 3/4 to 4/3 (its logarithm uniform), at a uniform
    place; the first of ten attempts that lies within the image, or else the largest central box of
    an allowed ratio.
    """
    shape = (_ATTEMPTS, len(heights))
    area = heights * widths * rng.uniform(SMALLEST_AREA, 1, shape)
    edge = np.log(LARGEST_ASPECT)
    aspect = np.exp(rng.uniform(-edge, edge, shape))
    height, width = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (height > 0) & (height <= heights) & (width > 0) & (width <= widths)
    # What does not fit at all takes the whole image, cut to an allowed ratio.
    last_height = np.minimum(heights, np.rint(widths * LARGEST_ASPECT))
    last_width = np.minimum(widths, np.rint(heights * LARGEST_ASPECT))
    height, width = _first(fits, (height, width), (last_height, last_width))
    place = rng.random((2, len(heights)))
    central = ~fits.any(axis=0)
    place[:, central] = 0.5
    room = np.stack([heights - height, widths - width])
    corner = np.floor(place * (room + ~central))
    return np.stack([*corner, height, width], axis=1).astype(np.int64)


def draw_erased(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes [N, 4] of random erasing, drawn as timm does; of no height where nothing is erased.

    With probability 1/4, 2 to 33 % of the area at an aspect ratio of 0.3 to 3.3 (its logarithm
    uniform), smaller than the image in both directions; the first of ten attempts.
    """
    shape = (_ATTEMPTS, count)
    area = size * size * rng.uniform(*_ERASED_AREA, shape)
    low, high = np.log(_ERASED_ASPECT)
    aspect = np.exp(rng.uniform(low, high, shape))
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (height < size) & (width < size)
    height, width = _first(fits, (height, width), (np.zeros(count), np.zeros(count)))
    height[rng.random(count) >= _ERASE_PROBABILITY] = 0
    room = np.stack([size - height, size - width])
    corner = np.floor(rng.random((2, count)) * (room + 1))
    return np.stack([*corner, height, width], axis=1).astype(np.int64)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] to float32, with ImageNet's mean and standard deviation."""
    device = pixels.device
    mean, std = (
        to_device(torch.tensor(x)[:, None, None], device)
        for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return pixels.float().div_(255).sub_(mean).div_(std)


def erase(images: Tensor, boxes: np.ndarray, seed: int) -> Tensor:
    """Fills boxes [N, 4] of images [N, 3, S, S] with normal noise, in place."""
    generator = torch.Generator(images.device).manual_seed(seed)
    for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
        if height:
            noise = torch.randn(3, height, width, generator=generator, device=images.device)
            image[:, top : top + height, left : left + width] = noise
    return images


def _first(
    fits: np.ndarray, attempts: Sequence[np.ndarray], otherwise: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Of attempts [A, N] the first that fits, [N], or else the last resort."""
    number, found = fits.argmax(axis=0), fits.any(axis=0)
    columns = np.arange(fits.shape[1])
    return [
        np.where(found, attempt[number, columns], last)
        for attempt, last in zip(attempts, otherwise, strict=True)
    ]


def _shift(images: Tensor, draws: Draws) -> Tensor:
    """Images [N, S, S, 3] shifted by whole pixels, black where nothing is, then flipped."""
    size, device = images.shape[1], images.device
    steps = np.arange(size)
    down = draws.box[:, :1] + steps
    along = draws.box[:, 1:2] + np.where(draws.flip[:, None], steps[::-1], steps)
    rows = to_device(torch.from_numpy(down), device)[:, :, None]
    columns = to_device(torch.from_numpy(along), device)[:, None, :]
    number = torch.arange(len(images), device=device)[:, None, None]
    taken = images[number, rows.clamp(0, size - 1), columns.clamp(0, size - 1)]
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    # Contiguous, as every other source of images gives them: a compiled student is of one layout.
    return (taken * inside[..., None]).permute(0, 3, 1, 2).contiguous()
