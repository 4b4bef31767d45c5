"""Transform batches on any device.

The host draws the parameters of a whole batch from the distributions of timm and torchvision; the
pixels stay on the device. The order is that of `lg.augment.recipe`: a random view, RandAugment,
normalisation, random erasing.
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

_ATTEMPTS = 10  # draws of a box before the fallback, as in torchvision and timm
_ERASE_PROBABILITY = 0.25
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)


class Draws(NamedTuple):
    """Random parameters of N images, in host memory."""

    box: np.ndarray  # [N, 4], top, left, height, width in pixels
    flip: np.ndarray  # [N], bool
    operations: randaugment.Draws | None  # of RandAugment
    erased: np.ndarray  # [N, 4], boxes in the result; height 0 erases nothing
    noise: int  # seed of the noise in the erased boxes


class BatchTransform:
    """Training transform of batches, with the distributions of `TrainTransform`."""

    def __init__(self, *, image_size: int, strong: bool, hflip: float = 0.5) -> None:
        self.image_size, self.strong, self.hflip = image_size, strong, hflip

    def prepare(self, image: Image.Image) -> Image.Image:
        """Resize an image for the cache.

        The plain recipe starts with a resize, which is applied here once. The strong recipe takes
        crops of any size: an image is shrunk only as far as its smallest crop, at the most extreme
        aspect ratio, still has the size of the result in both directions.
        """
        size = self.image_size
        if not self.strong:
            return image.resize((size, size), Image.Resampling.BICUBIC)
        needed = size / (SMALLEST_AREA / LARGEST_ASPECT) ** 0.5  # square root of the area
        scale = needed / (image.width * image.height) ** 0.5
        if scale >= 1:
            return image
        sides = (max(1, round(side * scale)) for side in image.size)
        return image.resize(tuple(sides), Image.Resampling.BICUBIC)

    def draw(self, heights: np.ndarray, widths: np.ndarray, rng: np.random.Generator) -> Draws:
        """Draw the parameters of N cached images, given their sizes [N] in pixels."""
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
        """Transform cached images ([H, W, 3], uint8) to [N, 3, S, S], float32, normalised."""
        size = self.image_size
        if draws.operations is None:
            assert isinstance(images, Tensor), "the plain recipe caches images of one size"
            return normalise(_shift(images, draws))
        pixels = crop_and_resize(images, draws.box, size, draws.flip)
        pixels = randaugment.randaugment(pixels, draws.operations)
        return erase(normalise(pixels), draws.erased, draws.noise)


class BatchTestTransform:
    """Test transform of batches: the whole image, resized and normalised."""

    def __init__(self, *, image_size: int) -> None:
        self.image_size = image_size

    def prepare(self, image: Image.Image) -> Image.Image:
        """Resize an image for the cache if it is larger than the result or very elongated."""
        size = self.image_size
        if image.width * image.height <= size * size and max(image.size) <= 4 * size:
            return image
        return image.resize((size, size), Image.Resampling.BICUBIC)

    def apply(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Transform cached images ([H, W, 3], uint8) to [N, 3, S, S], float32, normalised."""
        boxes = np.array([[0, 0, *image.shape[:2]] for image in images])
        flip = np.zeros(len(boxes), dtype=bool)
        return normalise(crop_and_resize(images, boxes, self.image_size, flip))


def views(draws: Draws, heights: np.ndarray, widths: np.ndarray) -> Tensor:
    """Return the drawn views [N, 5] of images of these sizes, see `lg.augment.view.View`."""
    sizes = np.stack([heights, widths, heights, widths], axis=1)
    columns = np.concatenate([draws.box / sizes, draws.flip[:, None]], axis=1)
    return torch.from_numpy(columns.astype(np.float32))


def draw_crops(heights: np.ndarray, widths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw boxes [N, 4] of random resized crops as torchvision does.

    A box covers 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3 (uniform logarithm) and a
    uniform position. The first of ten attempts that fits into the image is used, or else the
    largest central box of an allowed ratio.
    """
    shape = (_ATTEMPTS, len(heights))
    area = heights * widths * rng.uniform(SMALLEST_AREA, 1, shape)
    edge = np.log(LARGEST_ASPECT)
    aspect = np.exp(rng.uniform(-edge, edge, shape))
    height, width = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (height > 0) & (height <= heights) & (width > 0) & (width <= widths)
    # If none fits: the whole image, cropped to an allowed ratio.
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
    """Draw boxes [N, 4] of random erasing as timm does; height 0 erases nothing.

    With probability 1/4 a box covers 2 to 33 % of the area at an aspect ratio of 0.3 to 3.3
    (uniform logarithm). The first of ten attempts that is smaller than the image in both directions
    is used.
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
    """Normalise uint8 [N, 3, S, S] to float32 with ImageNet's mean and standard deviation."""
    device = pixels.device
    mean, std = (
        to_device(torch.tensor(x)[:, None, None], device)
        for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return pixels.float().div_(255).sub_(mean).div_(std)


def erase(images: Tensor, boxes: np.ndarray, seed: int) -> Tensor:
    """Fill boxes [N, 4] of images [N, 3, S, S] with normal noise, in place."""
    generator = torch.Generator(images.device).manual_seed(seed)
    for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
        if height:
            noise = torch.randn(3, height, width, generator=generator, device=images.device)
            image[:, top : top + height, left : left + width] = noise
    return images


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


def _shift(images: Tensor, draws: Draws) -> Tensor:
    """Shift images [N, S, S, 3] by whole pixels over black, then flip them."""
    size, device = images.shape[1], images.device
    steps = np.arange(size)
    down = draws.box[:, :1] + steps
    along = draws.box[:, 1:2] + np.where(draws.flip[:, None], steps[::-1], steps)
    rows = to_device(down, device)[:, :, None]
    columns = to_device(along, device)[:, None, :]
    number = torch.arange(len(images), device=device)[:, None, None]
    taken = images[number, rows.clamp(0, size - 1), columns.clamp(0, size - 1)]
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    # Contiguous as in the strong recipe: a compiled student expects one memory layout.
    return (taken * inside[..., None]).permute(0, 3, 1, 2).contiguous()
