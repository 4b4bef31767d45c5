"""The operations of RandAugment in five kinds; on uint8 tensors, with the pixel values of Pillow.

Results are truncated, not rounded, and uncovered areas are filled. A kind has two functions. On the
host, `prepare` turns the names of operations (in the order of KINDS), their levels [n], float64,
the side and the channels into arrays; on the device, `apply` gets images [n, C, S, S], which it may
overwrite, the names, the pixel that fills uncovered areas and the copied arrays, and returns the
same type and shape. Nothing is read back from the device.

KINDS are for RGB images of uint8, GRAY_KINDS for gray ones of float32, which keep more than 256
levels.

Letters in shapes: n samples of one kind, C channels, S side, P = S * S pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor

from lg.augment.preprocessing import fill_colour
from lg.augment.tones import apply_tones, prepare_levels

Fill = tuple[float, ...]  # per channel, 0 to 255
FILL: Fill = fill_colour(IMAGENET_DEFAULT_MEAN)
LUMA = (19595.0, 38470.0, 7471.0)  # of 65536; float32 represents their sums exactly
# Float32 may fall just below a whole number that Pillow's double reaches; both are truncated.
SLACK = 1e-4


class Kind(NamedTuple):
    """Operations that are applied together."""

    names: tuple[str, ...]
    prepare: Callable[[list[str], np.ndarray, int, int], list[np.ndarray]]
    apply: Callable[..., Tensor]  # (images, names, fill, *arrays)


@functools.lru_cache
def colours(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one value per channel as [C, 1, 1], float32. Do not modify the result."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _bytes(values: Tensor) -> Tensor:
    """Convert float32 to uint8 as Pillow does: clipped and truncated."""
    return values.clamp_(0, 255).to(torch.uint8)


def _as(images: Tensor, values: Tensor) -> Tensor:
    """Convert float32 values to the type of images: uint8, or float32 from 0 to 255."""
    return _bytes(values) if images.dtype == torch.uint8 else values.clamp_(0, 255)


# Kind 1: a lookup table of 256 values per channel.


# In the order of KINDS: operations that depend on the image come first.
_FROM_IMAGES = ("AutoContrast", "Equalize", "ContrastIncreasing")


def _prepare_tables(
    names: list[str], level: np.ndarray, size: int, channels: int
) -> list[np.ndarray]:
    """Return the factors of ContrastIncreasing and the tables that do not depend on images."""
    first, last = (sum(name in some for name in names) for some in (_FROM_IMAGES[:2], _FROM_IMAGES))
    fixed = [_fixed_table(*x) for x in zip(names[last:], level[last:], strict=True)]
    factor = level[first:last, None, None].astype(np.float32)
    return [factor, np.array(fixed, dtype=np.uint8).reshape(len(fixed), 1, 256)]


def _by_table(
    images: Tensor, names: list[str], fill: Fill, factor: Tensor, fixed: Tensor
) -> Tensor:
    index = images.flatten(2).long()
    first, second, third = np.cumsum([names.count(name) for name in _FROM_IMAGES]).tolist()
    tables = []
    if first > 0:
        tables.append(_autocontrast_tables(images[:first]))
    if second > first:
        tables.append(_equalize_tables(index[first:second]))
    if third > second:
        tables.append(_contrast_tables(images[second:third], factor))
    if third < len(names):
        tables.append(fixed.expand(-1, 3, -1))
    return torch.cat(tables).gather(2, index).view_as(images)


def _fixed_table(name: str, level: float) -> np.ndarray:
    """Return the table [256], uint8, of an operation that does not depend on the image."""
    values = np.arange(256)
    if name == "Invert":
        values = 255 - values
    elif name == "PosterizeIncreasing":
        values = values & -(1 << (8 - min(int(level), 8)))
    elif name == "SolarizeIncreasing":
        values = np.where(values < int(level), values, 255 - values)
    elif name == "SolarizeAdd":
        values = np.where(values < 128, (values + int(level)).clip(max=255), values)
    else:
        assert name == "BrightnessIncreasing", name
        values = (values.astype(np.float32) * np.float32(level)).clip(0, 255)
    return values.astype(np.uint8)


def _autocontrast_tables(images: Tensor) -> Tensor:
    """Return tables [n, 3, 256], uint8, that stretch the range of each channel.

    A channel with a single value does not change.
    """
    low, high = (x[..., None].double() for x in images.flatten(2).aminmax(dim=2))
    values = torch.arange(256, device=images.device, dtype=torch.float64)
    # `255 / tensor` would multiply by a reciprocal, which sometimes rounds differently.
    scale = torch.full_like(low, 255).div_((high - low).clamp_(min=1))
    stretched = (values * scale).sub_(low * scale)
    # If there is one value only, it became 0.
    return stretched.add_(low * (high == low)).clamp_(0, 255).to(torch.uint8)


def _equalize_tables(index: Tensor) -> Tensor:
    """Return equalising tables [n, 3, 256], uint8, for pixels [n, 3, P], int64.

    A channel with too few values does not change.
    """
    counts = torch.zeros(*index.shape[:2], 256, dtype=torch.int32, device=index.device)
    one = torch.ones((), dtype=torch.int32, device=index.device)
    counts.scatter_add_(2, index, one.expand_as(index))
    below = counts.cumsum(2) - counts
    of_the_last = counts.gather(2, index.amax(2, keepdim=True))
    step = (index.shape[2] - of_the_last) // 255
    divisor = step.clamp(min=1)
    values = torch.arange(256, device=index.device)
    levels = (divisor // 2 + below).div_(divisor, rounding_mode="floor").clamp_(max=255)
    return torch.where(step > 0, levels, values).to(torch.uint8)


def _contrast_tables(images: Tensor, factor: Tensor) -> Tensor:
    """Return tables [n, 3, 256], uint8, that scale the distance to the rounded mean brightness."""
    pixels = images.shape[2] * images.shape[3]
    total = _luma(images.float()).sum((2, 3), keepdim=True, dtype=torch.float64)
    grey = (total / pixels + 0.5).floor().float()[..., 0]
    values = torch.arange(256, device=images.device, dtype=torch.float32)
    return _bytes(_blend(grey, values, factor)).expand(-1, 3, -1)


def _luma(pixels: Tensor) -> Tensor:
    """Return the brightness [n, 1, S, S] of [n, 3, S, S]; both are whole numbers in float32."""
    weighted = (pixels * colours(LUMA, pixels.device)).sum(1, keepdim=True)
    return weighted.add_(32768).mul_(1 / 65536).floor_()


def _blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """Return start + factor * (end - start) in float32, rounding each step as Pillow does.

    `lerp` fuses the steps, which sometimes moves a result across a whole number.
    """
    return (end - start).mul_(factor).add_(start)


# Kinds 2 and 3: blends with gray and with a smoothed image.


def _color(images: Tensor, names: list[str], fill: Fill, factor: Tensor) -> Tensor:
    pixels = images.float()
    return _bytes(_blend(_luma(pixels), pixels, factor))


def _sharpness(images: Tensor, names: list[str], fill: Fill, factor: Tensor) -> Tensor:
    """Blend with Pillow's SMOOTH, (1 1 1; 1 5 1; 1 1 1) / 13, which does not change the border."""
    if images.shape[3] < 3:
        return images
    is_uint8 = images.dtype == torch.uint8
    values = images.short() if is_uint8 else images
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1]
    total += rows[..., 2:]
    inner = values[:, :, 1:-1, 1:-1]
    total.add_(inner, alpha=4)
    # Rounding in float32 is exact: (total + 6.5) / 13 is never a whole number.
    smooth = total.float().add_(6.5).mul_(1 / 13).floor_() if is_uint8 else total * (1 / 13)
    images[:, :, 1:-1, 1:-1] = _as(images, _blend(smooth, inner.float(), factor))
    return images


# Kinds 4 and 5: moved images, by cubic interpolation of 4 x 4 pixels; border pixels are repeated.


def _cubic(offset: Tensor) -> list[Tensor]:
    """Return the weights of the pixels at -1, 0, 1, 2 for an offset of 0 to 1.

    This is Keys's kernel with a = -1, as in Pillow's `transform`; its `resize` uses -1/2.
    """
    rest = 1 - offset
    return [
        -offset * rest * rest,
        1 + offset * offset * (offset - 2),
        1 + rest * rest * (rest - 2),
        -rest * offset * offset,
    ]


def _filled(images: Tensor, values: Tensor, inside: Tensor, fill: Fill) -> Tensor:
    """Convert float32 [n, C, ...] to the type of images; fill where `inside` (0 or 1) is 0.

    On a CPU, arithmetic is several times faster than `where`.
    """
    colour = colours(fill, values.device).view(1, len(fill), *[1] * (values.dim() - 2))
    filled = values.sub_(colour).mul_(inside).add_(colour)
    return _as(images, filled.add_(SLACK) if images.dtype == torch.uint8 else filled)


def _prepare_shift(
    names: list[str], level: np.ndarray, size: int, channels: int
) -> list[np.ndarray]:
    """Return offsets to interpolate, whole shifts, and the columns that are inside, per row."""
    is_shear = np.array([name.startswith("Shear") for name in names])
    # [n, S]: horizontal offset, in pixels, of the source of each row. Beyond the side everything is
    # filled, so larger offsets are clipped.
    shift = level[:, None] * np.where(is_shear[:, None], np.arange(size) + 0.5, size)
    shift = shift.clip(-size - 1, size + 1)
    whole = np.floor(shift)
    first, last = np.ceil(-0.5 - shift), np.ceil(size - 0.5 - shift)
    offset = (shift - whole).astype(np.float32)[:, None, :, None]
    bounds = np.stack([first, last]).astype(np.int64)[:, :, None, :, None]
    return [offset, _starts(whole.astype(np.int64), size, channels), bounds]


def _starts(shift: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Return the positions [n * C * S] in `_windows` of rows shifted by whole pixels [n, S]."""
    width, margin = size + 4, size + 2
    rows = np.arange(len(shift) * channels * size).reshape(len(shift), channels, size)
    return (margin + 1 + width * rows + shift[:, None]).ravel()


def _shift(
    images: Tensor,
    names: list[str],
    fill: Fill,
    offset: Tensor,
    starts: Tensor,
    bounds: Tensor,
) -> Tensor:
    """Shear or translate along rows; operations along columns, the last ones, are transposed."""
    size = images.shape[3]
    along_rows = sum(name.endswith(("X", "XRel")) for name in names)
    images[along_rows:] = images[along_rows:].mT.clone()
    weights = _cubic(offset)
    windows = _windows(images, starts).float()
    values = windows[..., :size] * weights[0]
    for tap in range(1, 4):
        values.addcmul_(windows[..., tap : tap + size], weights[tap])
    columns = torch.arange(size, device=images.device)
    inside = (columns >= bounds[0]) & (columns < bounds[1])
    moved = _filled(images, values, inside.float(), fill)
    moved[along_rows:] = moved[along_rows:].mT.clone()
    return moved


def _windows(images: Tensor, starts: Tensor) -> Tensor:
    """Return [n, C, S, S + 3]: the four taps of each pixel, rows shifted by whole pixels.

    All rows, with repeated ends, are in one buffer, and one `index_select` on an overlapping view
    shifts them. Pixels taken from neighbouring rows are filled later.
    """
    count, channels, size, _ = images.shape
    width, margin = size + 4, size + 2
    length = count * channels * size * width
    buffer = images.new_zeros(margin + length + margin)
    rows = buffer[margin : margin + length].view(count, channels, size, width)
    rows[..., 2:-2] = images
    rows[..., :2] = images[..., :1]
    rows[..., -2:] = images[..., -1:]
    view = buffer.as_strided((len(buffer) - width + 2, width - 1), (1, 1))
    return view.index_select(0, starts).view(count, channels, size, width - 1)


def _prepare_rotate(
    names: list[str], degrees: np.ndarray, size: int, channels: int
) -> list[np.ndarray]:
    """Return the source of each pixel in double precision, as a term of its column and of its row.

    Both have x and y in their first dimension.
    """
    angle = -np.radians(degrees % 360)[:, None]
    cosine, sine = np.cos(angle).round(15), np.sin(angle).round(15)
    centres, middle = np.arange(size) + 0.5, size / 2
    of_column = np.stack([cosine * centres, -sine * centres])
    of_row = np.stack(
        [
            sine * centres + (middle - middle * (cosine + sine)),
            cosine * centres + (middle - middle * (cosine - sine)),
        ]
    )
    return [of_column[:, :, None, :], of_row[:, :, :, None]]


def _rotate(
    images: Tensor, names: list[str], fill: Fill, of_column: Tensor, of_row: Tensor
) -> Tensor:
    """Rotate counterclockwise about the centre."""
    count, channels, size, _ = images.shape
    source = (of_column + of_row).view(2, count, 1, -1)  # x and y
    is_inside = (source >= 0) & (source < size)
    # The first of four taps, in an image padded by 2, and the offset from it.
    source = source.clamp_(0, size).sub_(0.5)
    whole = source.floor()
    offset = (source - whole).float()
    column, row = whole.long().add_(1)
    width = size + 4
    planes = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").flatten(2)
    last = 3 * width + 3
    index = row.mul_(width).add_(column).expand(-1, channels, -1)
    weights = _cubic(offset)
    values = torch.zeros_like(planes[..., : size * size])
    for j in range(4):
        line = torch.zeros_like(values)
        for i in range(4):
            first = j * width + i
            taps = planes[..., first : planes.shape[2] - last + first].gather(2, index)
            line.addcmul_(taps, weights[i][0])
        values.addcmul_(line, weights[j][1])
    inside = (is_inside[0] & is_inside[1]).float()
    return _filled(images, values, inside, fill).view_as(images)


KINDS = (
    Kind(
        (
            *_FROM_IMAGES,
            "Invert",
            "PosterizeIncreasing",
            "SolarizeIncreasing",
            "SolarizeAdd",
            "BrightnessIncreasing",
        ),
        _prepare_tables,
        _by_table,
    ),
    Kind(("ColorIncreasing",), prepare_levels, _color),
    Kind(("SharpnessIncreasing",), prepare_levels, _sharpness),
    Kind(("ShearX", "TranslateXRel", "ShearY", "TranslateYRel"), _prepare_shift, _shift),
    Kind(("Rotate",), _prepare_rotate, _rotate),
)
# Saturation means nothing without colour; as in torchvision, it changes nothing.
GRAY_KINDS = (Kind(KINDS[0].names, prepare_levels, apply_tones), *KINDS[2:])
