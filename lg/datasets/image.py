"""Any image file as an upright RGB image.

The rules, for whatever is stored:

- transparency (an alpha channel, a transparent palette entry or colour) is laid over white, as a
  page or a viewer shows it; just dropping alpha would uncover arbitrary hidden colours;
- 16-bit gray is scaled, 65535 to 255, and rounded; it is not clipped;
- palette, 1-bit, CMYK, YCbCr, LAB and HSV are converted as Pillow does; ICC profiles are ignored;
- the EXIF orientation is applied; an unreadable EXIF block counts as none;
- of an animation, the first frame.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from lg.errors import DataError

EXIF_ORIENTATION = 0x0112  # the tag's number

# What `open_with_traits` tells of a stored image beyond plain 8-bit RGB.
TRAITS = ("palette", "gray", "16-bit", "CMYK", "transparent", "animated", "turned")

_Result = TypeVar("_Result")

# What turns a stored image upright, by the value of the tag. Source: EXIF 2.32, 4.6.4 A.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file in any format Pillow knows.

    Returns:
        A loaded RGB image, upright; see the top of this file for how other modes become RGB.

    Raises:
        DataError: the file is missing, unreadable, empty, truncated, too large, or no image.
    """
    return _opened(path, to_rgb)


def open_with_traits(path: str | os.PathLike[str]) -> tuple[Image.Image, tuple[str, ...]]:
    """As `open_rgb`, with those of TRAITS that the file has.

    Raises:
        DataError: as `open_rgb`.
    """
    return _opened(path, _with_traits)


def _opened(path: str | os.PathLike[str], use: Callable[[Image.Image], _Result]) -> _Result:
    """What `use` makes of an image file; what goes wrong is a DataError that names the file."""
    try:
        # Reading first tells a failing disk from a failing decoder, and closes the file.
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        if os.path.islink(path):
            raise DataError(
                f"{path}: the image is a link to {os.readlink(path)}, where nothing is; mend or "
                "remove it"
            ) from None
        raise DataError(f"{path}: the image is missing; unpack the data set again") from None
    except OSError as error:
        raise DataError(
            f"{path}: the image cannot be read ({error.strerror or error}); check that it is a "
            "file and its permissions"
        ) from error
    if not content:
        raise DataError(f"{path}: the image file is empty; fetch it again")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return use(image)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path}: the image is too large to be safe ({error}); shrink it, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: this is no image in a format that Pillow knows; remove or convert it"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders let a dozen types escape on a damaged file
        raise DataError(
            f"{path}: the image is damaged or cannot be converted ({error}); fetch it again, or "
            "save it as 8-bit RGB"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB image, upright, from an open image of any mode; see the top of this file.

    Raises:
        DataError: its pixels are floating point or 32-bit numbers beyond 16 bits, whose range of
            brightness is unknown.
    """
    image.load()  # TIFF turns itself upright, PNG learns its EXIF block while loading
    rgb = _convert(_upright(image))
    rgb.info = {}  # or whoever asks for the orientation would turn the image once more
    return rgb


def _convert(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # a plain image, without the format's class and its open file
    if image.mode == "F":
        raise DataError(
            "image of floating-point pixels (mode F), whose range is unknown; save it with 8 or "
            "16 bits"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def _with_traits(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    mode, raw_modes = image.mode, str(getattr(image, "tile", ""))
    turned = _orientation(image) in UPRIGHT
    rgb = to_rgb(image)
    found = {
        "palette": mode == "P",
        "gray": mode in ("1", "L", "LA", "La"),
        # Of 16-bit colours Pillow keeps 8 bits and tells of the others in its raw modes alone.
        "16-bit": mode.startswith("I") or ";16" in raw_modes,
        "CMYK": mode == "CMYK",
        "transparent": image.has_transparency_data,
        "animated": _has_more_frames(image),
        "turned": turned or _orientation(image) in UPRIGHT,
    }
    return rgb, tuple(trait for trait in TRAITS if found[trait])


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damage beyond the first frame, which alone is used
        return True


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _orientation(image: Image.Image) -> int:
    """The value of the EXIF tag, 1 (upright) where there is none."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block breaks the parser in many ways; the image is fine
        return 1


def _from_16_bits(image: Image.Image) -> Image.Image:
    """RGB from gray 0..65535. Mode I is how Pillow opens some 16-bit files, by its version."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise DataError(
            f"image of 32-bit pixels from {levels.min()} to {levels.max()}, whose range is "
            "unknown; save it with 8 or 16 bits (0..65535)"
        )
    gray = (levels + 128) // 257  # 65535 = 257 * 255: rounds to the nearest of 256 levels
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[levels == transparent] = 255
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied gray converts to nothing but LA
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
