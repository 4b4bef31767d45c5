"""Read any image file as an upright RGB image, or as a gray one that keeps 16 bits.

Conversion rules:

- Transparency (an alpha channel, a transparent palette entry or colour) is blended over white, as a
  viewer shows it; dropping alpha would expose arbitrary hidden colours.
- 16-bit gray is scaled (65535 to 255) and rounded, not clipped.
- Palette, 1-bit, CMYK, YCbCr, LAB and HSV are converted by Pillow; ICC profiles are ignored.
- The EXIF orientation is applied; an unreadable EXIF block is ignored.
- Only the first frame of an animation is used.

Gray images have Pillow's mode F, 0 to 255 with fractions: 8-bit gray as it is, 16-bit gray divided
by 257, RGB converted by Pillow (ITU-R 601 luma, rounded), or a window of the file's own numbers.
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lg.errors import DataError

GRAY_MODES = ("L", "1", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # of gray files


class PixelFormat(NamedTuple):
    """What images are converted to.

    Attributes:
        channels: 3 for RGB, 1 for gray.
        window: Of gray: (low, high), the file's numbers that become black and white; None for the
            whole range of 8 or 16 bits.
    """

    channels: int = 3
    window: tuple[float, float] | None = None

    def open(self, path: str | os.PathLike[str]) -> Image.Image:
        """Read an image file in any format that Pillow supports, as a loaded, upright image.

        Raises:
            DataError: The file is missing, unreadable, empty, truncated, too large or not an image.
        """
        try:
            # Reading first separates disk errors from decoder errors.
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise DataError(
                f"{path}: the image cannot be read ({error.strerror or error}); check that the "
                "file, or the target of a link, exists and is readable"
            ) from error
        if not content:
            raise DataError(f"{path}: the image file is empty; download it again")
        try:
            with Image.open(io.BytesIO(content)) as image:
                return self.convert(image)
        except Image.DecompressionBombError as error:
            raise DataError(
                f"{path}: the image is too large to be safe ({error}); shrink it, or raise "
                "PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
            ) from error
        except UnidentifiedImageError as error:
            raise DataError(
                f"{path}: the file is not an image that Pillow can read; remove or convert it"
            ) from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise many types on damaged files
            raise DataError(
                f"{path}: the image is damaged or cannot be converted ({error}); download it "
                "again, or save it as 8-bit RGB"
            ) from error

    def convert(self, image: Image.Image) -> Image.Image:
        """Convert an open image of any mode, as `to_rgb` or `to_gray` do."""
        return to_rgb(image) if self.channels == 3 else to_gray(image, self.window)


def pixel_tensor(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image, [H, W, 3] uint8, or of a gray one in mode F, [H, W, 1]
    float32 from 0 to 255."""
    pixels = torch.from_numpy(np.array(image))
    # Bicubic filters overshoot, which mode F does not cut.
    return pixels if pixels.dim() == 3 else pixels.clamp_(0, 255)[..., None]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an open image of any mode to upright RGB by the rules at the top of this file.

    Its `info` holds only the `mode` of the file; an EXIF block could apply the orientation again.

    Raises:
        DataError: Its pixels are floating-point or 32-bit numbers beyond 16 bits, whose range is
            unknown.
    """
    _make_upright(image)
    rgb = _convert(image)
    rgb.info = {"mode": image.mode}
    return rgb


def to_gray(image: Image.Image, window: tuple[float, float] | None = None) -> Image.Image:
    """Convert an open image of any mode to upright gray in mode F, 0 to 255, see the top.

    Its `info` holds only the `mode` of the file.

    Args:
        image: The image.
        window: (low, high), numbers of the file that become 0 and 255; others are clipped.

    Raises:
        DataError: Without a window, its pixels are floating-point or 32-bit numbers beyond 16 bits,
            whose range is unknown; or a pixel is not a number.
    """
    _make_upright(image)
    is_deep = image.mode in GRAY_MODES[2:]
    flat = image if is_deep else _convert(image)
    levels = np.asarray(flat if is_deep else flat.convert("L")).astype(np.float64)
    if not np.isfinite(levels).all():
        raise DataError("a pixel is not a finite number")
    if window is not None:
        low, high = window
        levels = ((levels - low) * (255 / (high - low))).clip(0, 255)
    elif is_deep:
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise DataError(
                f"the pixels are numbers of unknown range, {levels.min():g} to {levels.max():g}; "
                "set DATA_LOADER.WINDOW to [low, high], the numbers that become black and white"
            )
        levels = levels / 257  # 65535 = 257 * 255
    gray = Image.fromarray(levels.astype(np.float32))
    gray.info = {"mode": image.mode}
    return gray


def _make_upright(image: Image.Image) -> None:
    image.load()  # PNG may read its EXIF block only now, and TIFF applies the orientation itself
    with contextlib.suppress(Exception):  # a broken EXIF block; the pixels are fine
        ImageOps.exif_transpose(image, in_place=True)


def _convert(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # a plain image, without the format's class and its open file
    if image.mode == "F":
        raise DataError(
            "the pixels are floating-point numbers (mode F) of unknown range; save the image with "
            "8 or 16 bits"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Convert gray 0..65535 to RGB. Depending on its version, Pillow opens some as mode I."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise DataError(
            f"the pixels are 32-bit numbers of unknown range, {levels.min()} to {levels.max()}; "
            "save the image with 8 or 16 bits (0..65535)"
        )
    gray = (levels + 128) // 257  # 65535 = 257 * 255: rounds to the nearest of 256 levels
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[levels == transparent] = 255
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied gray converts to LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
