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
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lg.errors import DataError

# Properties beyond plain 8-bit RGB that `open_with_traits` reports.
TRAITS = ("palette", "gray", "16-bit", "CMYK", "transparent", "animated", "turned")

_Result = TypeVar("_Result")


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file in any format that Pillow supports.

    Returns:
        A loaded, upright RGB image; the conversion rules are at the top of this file.

    Raises:
        DataError: The file is missing, unreadable, empty, truncated, too large or not an image.
    """
    return _open(path, to_rgb)


def open_with_traits(path: str | os.PathLike[str]) -> tuple[Image.Image, tuple[str, ...]]:
    """Read an image file as `open_rgb` does, and return its TRAITS as well.

    Raises:
        DataError: As `open_rgb`.
    """
    return _open(path, _with_traits)


def _open(path: str | os.PathLike[str], convert: Callable[[Image.Image], _Result]) -> _Result:
    """Open an image file and convert it; every error is a DataError that names the file."""
    try:
        # Reading first separates disk errors from decoder errors.
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        if os.path.islink(path):
            raise DataError(
                f"{path}: the image is a link to {os.readlink(path)}, which does not exist; repair "
                "or remove it"
            ) from None
        raise DataError(f"{path}: the image is missing; unpack the data set again") from None
    except OSError as error:
        raise DataError(
            f"{path}: the image cannot be read ({error.strerror or error}); check that it is a "
            "file and check its permissions"
        ) from error
    if not content:
        raise DataError(f"{path}: the image file is empty; download it again")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return convert(image)
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

    Raises:
        DataError: Its pixels are floating-point or 32-bit numbers beyond 16 bits, whose range is
            unknown.
    """
    image.load()  # PNG may read its EXIF block only now, and TIFF applies the orientation itself
    with contextlib.suppress(Exception):  # a broken EXIF block; the pixels are fine
        ImageOps.exif_transpose(image, in_place=True)
    rgb = _convert(image)
    rgb.info = {}  # with its EXIF block, the orientation could be applied again
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


def _with_traits(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    mode, raw_modes = image.mode, str(getattr(image, "tile", ""))
    turned = _is_turned(image)  # TIFF drops the orientation when it loads
    image.load()
    turned = turned or _is_turned(image)
    rgb = to_rgb(image)
    found = {
        "palette": mode == "P",
        "gray": mode in ("1", "L", "LA", "La"),
        # Pillow keeps 8 bits of 16-bit colours; only its raw modes show the original depth.
        "16-bit": mode.startswith("I") or ";16" in raw_modes,
        "CMYK": mode == "CMYK",
        "transparent": image.has_transparency_data,
        "animated": _has_more_frames(image),
        "turned": turned,
    }
    return rgb, tuple(trait for trait in TRAITS if found[trait])


def _is_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation is other than upright (1)."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # a broken EXIF block may raise anything
        return False


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damage after the first frame, the only one in use
        return True


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
