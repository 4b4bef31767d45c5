"""Transform batches on any device: the one definition of the training and the test recipe.

The host draws the parameters of a batch (`lg.augment.draws`); the pixels stay on the device. The
strong recipe is a random resized crop (bicubic), a flip, RandAugment (`rand-m9-mstd0.5-inc1` of
timm), normalisation and, with probability 1/4, a box erased with normal noise. The plain recipe is
a resize to a square, a shift by up to an eighth of the side over black, a flip and normalisation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from lg.augment import randaugment
from lg.augment.draws import Draws, draw_plain, draw_strong, uniforms
from lg.augment.operations import colours
from lg.augment.preprocessing import fill_colour, make_square, resized
from lg.augment.resample import crop_and_resize
from lg.augment.view import LARGEST_ASPECT, SMALLEST_AREA, View
from lg.device import to_device_together

_NUM_NOISES = 2**20


class BatchTransform:
    """Training transform of batches.

    What an image looks like depends on the seed, the epoch and its index alone.
    """

    def __init__(
        self,
        *,
        image_size: int,
        strong: bool,
        hflip: float = 0.5,
        seed: int = 0,
        resize: str = "squash",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self.image_size, self.strong, self.hflip, self.seed = image_size, strong, hflip, seed
        self.resize, self.mean, self.std = resize, tuple(mean), tuple(std)
        self.fill = fill_colour(mean)

    def prepare(self, image: Image.Image) -> Image.Image:
        """Resize an image as far as it is the same in every epoch.

        The plain recipe starts with a resize, which is applied here once. The strong recipe takes
        crops of any size: an image is shrunk only as far as its smallest crop, at the most extreme
        aspect ratio, still has the size of the result in both directions. letterbox and crop make
        it square first.
        """
        size = self.image_size
        if not self.strong:
            return make_square(image, size, self.resize, self.fill)
        needed = size / (SMALLEST_AREA / LARGEST_ASPECT) ** 0.5  # square root of the area
        if self.resize != "squash":
            side = max(image.size) if self.resize == "letterbox" else min(image.size)
            return make_square(image, min(side, round(needed)), self.resize, self.fill)
        scale = needed / (image.width * image.height) ** 0.5
        if scale >= 1:
            return image
        width, height = (max(1, round(side * scale)) for side in image.size)
        return resized(image, (width, height))

    def __call__(
        self, images: Tensor | Sequence[Tensor], *, epochs: Iterable[int], index: Iterable[int]
    ) -> tuple[Tensor, Tensor]:
        """Transform N prepared images.

        Args:
            images: [H, W, 3] each, uint8, or [H, W, 1] float32 from 0 to 255, on any device.
            epochs: Of each image, counted from 0.
            index: Positions of the images in the full data set.

        Returns:
            [N, C, S, S], float32, normalised, on the same device; the views [N, 5] in host memory,
            see `lg.augment.view.View`.
        """
        heights, widths = (np.array([image.shape[i] for image in images]) for i in (0, 1))
        draws = self.draw(heights, widths, uniforms(self.seed, epochs, index))
        return self.apply(images, draws), draws.views(heights, widths)

    def draw(self, heights: np.ndarray, widths: np.ndarray, numbers: np.ndarray) -> Draws:
        """Turn `uniforms` of N prepared images into draws, given their sizes [N] in pixels."""
        if self.strong:
            return draw_strong(heights, widths, numbers, size=self.image_size, hflip=self.hflip)
        return draw_plain(numbers, size=self.image_size, hflip=self.hflip)

    def apply(self, images: Tensor | Sequence[Tensor], draws: Draws) -> Tensor:
        """Transform prepared images with given draws to [N, C, S, S], float32, normalised."""
        if draws.operations is None:
            assert isinstance(images, Tensor), "the plain recipe prepares images of one size"
            return normalise(_shift(images, draws), self.mean, self.std)
        pixels = crop_and_resize(images, draws.box, self.image_size, draws.flip)
        pixels = randaugment.randaugment(pixels, draws.operations, self.fill)
        return erase(normalise(pixels, self.mean, self.std), draws.erased, draws.noise)


class BatchTestTransform:
    """Test transform of batches: the image, made square (bicubic, S x S) and normalised."""

    def __init__(
        self,
        *,
        image_size: int,
        resize: str = "squash",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        fill: tuple[float, ...] | None = None,  # of borders; None: the mean
    ) -> None:
        self.image_size, self.resize, self.mean, self.std = image_size, resize, mean, std
        self.fill = fill or fill_colour(mean)

    def prepare(self, image: Image.Image) -> Image.Image:
        """Resize an image if that loses no time later: it is large, or becomes square here."""
        size = self.image_size
        if self.resize != "squash":
            return make_square(image, size, self.resize, self.fill)
        if image.width * image.height <= size * size and max(image.size) <= 4 * size:
            return image
        return resized(image, (size, size))

    def __call__(
        self, images: Tensor | Sequence[Tensor], *, epochs: Iterable[int], index: Iterable[int]
    ) -> tuple[Tensor, Tensor]:
        """Transform as `BatchTransform` does; epochs and index do not matter."""
        size, view = self.image_size, View().tensor().expand(len(images), -1)
        if isinstance(images, Tensor) and images.shape[1:3] == (size, size):
            pixels = images.permute(0, 3, 1, 2).contiguous()
            return normalise(pixels, self.mean, self.std), view
        boxes = np.array([[0, 0, *image.shape[:2]] for image in images])
        flip = np.zeros(len(boxes), dtype=bool)
        pixels = crop_and_resize(images, boxes, size, flip)
        return normalise(pixels, self.mean, self.std), view


def normalise(
    pixels: Tensor,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Tensor:
    """Normalise [N, C, S, S] of 0..255 to float32; `mean` and `std` are for pixels from 0 to 1."""
    middle, width = (_levels(values, pixels.device) for values in (mean, std))
    return (pixels - middle).div_(width)


def to_pixels(
    images: Tensor,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Tensor:
    """Undo `normalise`: float [N, C, S, S] to RGB uint8 [N, S, S, 3], cut to its range."""
    middle, width = (_levels(values, images.device) for values in (mean, std))
    pixels = (images.float() * width + middle).round_().clamp_(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)


def _levels(values: Sequence[float], device: torch.device) -> Tensor:
    return colours(tuple(255 * value for value in values), device)


def erase(images: Tensor, boxes: np.ndarray, noise: np.ndarray) -> Tensor:
    """Fill boxes with normal noise, on a CPU in place.

    Args:
        images: [N, C, S, S], up to 3 channels.
        boxes: [N, 4], top, left, height, width; height 0 erases nothing.
        noise: [N], 0 to 1, selects the noise of each image: the same in any batch, on any device.
    """
    choices = noise_images(images.shape[3], images.device)[:, : images.shape[1]]
    number = (noise * _NUM_NOISES).astype(np.int64)
    if images.is_cuda:
        return erase_together(images, boxes, choices, number)
    for image, choice, box in zip(images, number.tolist(), boxes.tolist(), strict=True):
        top, left, height, width = box
        if height:
            place = (slice(None), slice(top, top + height), slice(left, left + width))
            image[place] = choices[choice][place]
    return images


def erase_together(
    images: Tensor, boxes: np.ndarray, choices: Tensor, number: np.ndarray
) -> Tensor:
    """Compute `erase` with a few kernel launches per batch instead of per image."""
    first, last = boxes[:, None, :2], boxes[:, None, :2] + boxes[:, None, 2:]
    steps = np.arange(images.shape[3])[:, None]
    inside = (steps >= first) & (steps < last)  # [N, S, 2], of rows and of columns
    arrays = [number, inside[:, None, :, None, 0], inside[:, None, None, :, 1]]
    chosen, rows, columns = to_device_together(arrays, images.device)
    return torch.where(rows & columns, choices[chosen], images)


@functools.lru_cache(maxsize=4)
def noise_images(size: int, device: torch.device) -> Tensor:
    """Return 2^20 images [3, size, size] of normal noise: windows of one row of numbers.

    Taking noise from memory costs less than drawing it, and gives the same values on all devices.
    """
    plane = size * size
    values = np.random.Generator(np.random.Philox(0)).standard_normal(
        _NUM_NOISES + 3 * plane, dtype=np.float32
    )
    row = torch.from_numpy(values).to(device)
    return row.as_strided((_NUM_NOISES, 3, size, size), (1, plane, size, 1))


def _shift(images: Tensor, draws: Draws) -> Tensor:
    """Shift images [N, S, S, C] by whole pixels over black, then flip them."""
    size, device = images.shape[1], images.device
    steps = np.arange(size)
    down = draws.box[:, :1] + steps
    along = draws.box[:, 1:2] + np.where(draws.flip[:, None], steps[::-1], steps)
    rows, columns = to_device_together([down[:, :, None], along[:, None, :]], device)
    number = torch.arange(len(images), device=device)[:, None, None]
    taken = images[number, rows.clamp(0, size - 1), columns.clamp(0, size - 1)]
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    # Contiguous as in the strong recipe: a compiled student expects one memory layout.
    return (taken * inside[..., None]).permute(0, 3, 1, 2).contiguous()
