"""Read any image file as an upright RGB image.

Conversion rules:

- Transparency (an alpha channel, a transparent palette entry or colour) is blended over white, as a
  viewer shows it; dropping alpha would expose arbitrary hidden colours.
- 16-bit gray is scaled (65535 to 255) and rounded, not clipped.
- Palette, 1-bit, CMYK, YCbCr, LAB and HSV are converted by Pillow; ICC profiles are ignored.
- The EXIF orientation is applied; an unreadable EXIF block is ignored.
- Only the first frame of an animation is used.
"""

from __future__ import annotations

import contextlib
import io
import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lg.errors import DataError


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file in any format that Pillow supports.

    Returns:
        A loaded, upright RGB image; the conversion rules are at the top of this file.

    Raises:
        DataError: The file is missing, unreadable, empty, truncated, too large or not an image.
    """
    try:
        # Reading first separates disk errors from decoder errors.
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(
            f"{path}: the image cannot be read ({error.strerror or error}); check that the file, "
            "or the target of a link, exists and is readable"
        ) from error
    if not content:
        raise DataError(f"{path}: the image file is empty; download it again")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path}: the image is too large to be safe ({error}); shrink it, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: the file is not an image that Pillow can read; remove or convert it"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise DataError(
            f"{path}: the image is damaged or cannot be converted ({error}); download it again, or "
            "save it as 8-bit RGB"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an open image of any mode to upright RGB by the rules at the top of this file.

    Its `info` holds only the `mode` of the file; an EXIF block could apply the orientation again.

    Raises:
        DataError: Its pixels are floating-point or 32-bit numbers beyond 16 bits, whose range is
            unknown.
    """
    image.load()  # PNG may read its EXIF block only now, and TIFF applies the orientation itself
    with contextlib.suppress(Exception):  # a broken EXIF block; the pixels are fine
        ImageOps.exif_transpose(image, in_place=True)
    rgb = _convert(image)
    rgb.info = {"mode": image.mode}
    return rgb


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
