"""How an image becomes the model's input, apart from augmentation."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN

RESIZE_RULES = ("squash", "letterbox", "crop")


@dataclass(frozen=True)
class Preprocessing:
    """Facts that training, tests, prediction and exported models share.

    Attributes:
        image_size: Side of the square input, pixels.
        resize: How an image that is not square becomes square, see `make_square`.
    """

    image_size: int
    resize: str = "squash"


def make_square(image: Image.Image, size: int, rule: str) -> Image.Image:
    """Resize an image (bicubic) to size x size.

    Args:
        image: Any image.
        size: Side of the result, pixels.
        rule: squash changes the aspect ratio of the whole image; letterbox keeps it and fills the
            borders evenly with the mean colour; crop keeps it and shows the central square.
    """
    if image.width == image.height or rule == "squash":
        return resized(image, (size, size))
    if rule == "crop":
        short = min(image.size)
        left, top = (image.width - short) / 2, (image.height - short) / 2
        box = (left, top, left + short, top + short)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    assert rule == "letterbox", rule
    scale = size / max(image.size)
    width, height = (max(1, round(scale * side)) for side in image.size)
    fill = tuple(round(255 * value) for value in IMAGENET_DEFAULT_MEAN)
    canvas = Image.new(image.mode, (size, size), fill)
    canvas.paste(resized(image, (width, height)), ((size - width) // 2, (size - height) // 2))
    return canvas


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image (bicubic); return it as it is if it has that width and height."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
