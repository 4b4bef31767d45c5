"""How an image becomes the model's input, apart from augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


@dataclass(frozen=True)
class Preprocessing:
    """Facts that training, tests, prediction and exported models share.

    Attributes:
        image_size: Side of the square input, pixels.
        resize: How an image that is not square becomes square, see `make_square`.
        mean: Of each channel, for pixels from 0 to 1; the input is (pixel - mean) / std.
        std: Likewise.
    """

    image_size: int
    resize: str = "squash"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    @property
    def black(self) -> list[float]:
        """The input of a black pixel, per channel."""
        return [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]


def fill_colour(mean: Sequence[float]) -> tuple[float, ...]:
    """Return the pixel, 0 to 255 per channel, that fills what no image covers: the mean.

    Colours are whole levels.
    """
    return tuple(255 * value if len(mean) == 1 else round(255 * value) for value in mean)


def renormalization(
    old: Preprocessing, new: Preprocessing
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return (scale, shift) per channel that turn normalised images of `old` into those of `new`,
    or None if they are the same."""
    if (old.mean, old.std) == (new.mean, new.std):
        return None
    scale = tuple(a / b for a, b in zip(old.std, new.std, strict=True))
    shift = tuple((a - b) / c for a, b, c in zip(old.mean, new.mean, new.std, strict=True))
    return scale, shift


def make_square(image: Image.Image, size: int, rule: str, fill: tuple[float, ...]) -> Image.Image:
    """Resize an image (bicubic) to size x size.

    Args:
        image: RGB, or gray in mode F.
        size: Side of the result, pixels.
        rule: squash changes the aspect ratio of the whole image; letterbox keeps it and fills the
            borders evenly; crop keeps it and shows the central square.
        fill: Pixel of the borders, 0 to 255 per channel.
    """
    if image.width == image.height or rule == "squash":
        return resized(image, (size, size))
    if rule == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    assert rule == "letterbox", rule
    scale = size / max(image.size)
    width, height = (max(1, round(scale * side)) for side in image.size)
    colour: Any = fill[0] if len(fill) == 1 else fill
    canvas = Image.new(image.mode, (size, size), colour)
    canvas.paste(resized(image, (width, height)), ((size - width) // 2, (size - height) // 2))
    return canvas


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image (bicubic); return it as it is if it has that width and height."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
