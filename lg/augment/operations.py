"""The operations of RandAugment on uint8 tensors, in five kinds, with the pixel values of Pillow.

Results are truncated, not rounded, and uncovered areas are filled. Each kind takes images
[n, 3, S, S] of uint8, which it may overwrite, the names of their operations (in the order of KINDS)
and their levels [n], float64, and returns uint8 of the same shape. Copies to the device are
asynchronous; nothing is read back.

Letters in shapes: n samples of one kind, S side, P = S * S pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor

from lg.device import to_device

FILL = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
LUMA = (19595.0, 38470.0, 7471.0)  # of 65536; float32 represents their sums exactly
# Float32 may fall just below a whole number that Pillow's double reaches; both are truncated.
SLACK = 1e-4


def _colours(images: Tensor, values: tuple[float, ...]) -> Tensor:
    """Return one value per channel as [3, 1, 1], float32."""
    return to_device(np.array(values, dtype=np.float32)[:, None, None], images.device)


def _bytes(values: Tensor) -> Tensor:
    """Convert float32 to uint8 as Pillow does: clipped and truncated."""
    return values.clamp_(0, 255).to(torch.uint8)


# Kind 1: a lookup table of 256 values per channel.


def _by_table(images: Tensor, names: list[str], level: np.ndarray) -> Tensor:
    index = images.flatten(2).long()
    # In the order of KINDS: three operations that depend on the image, then the rest.
    first, second, third = np.cumsum(
        [names.count(n) for n in ("AutoContrast", "Equalize", "ContrastIncreasing")]
    ).tolist()
    tables = []
    if first > 0:
        tables.append(_autocontrast_tables(images[:first]))
    if second > first:
        tables.append(_equalize_tables(index[first:second]))
    if third > second:
        tables.append(_contrast_tables(images[second:third], level[second:third]))
    if third < len(names):
        fixed = np.stack([_fixed_table(*x) for x in zip(names[third:], level[third:], strict=True)])
        tables.append(to_device(fixed, images.device)[:, None].expand(-1, 3, -1))
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
    scale = torch.full_like(low, 255).div_((high - low).clamp(min=1))
    stretched = (values * scale + -low * scale).clamp_(0, 255)
    single = (high == low).double()
    return (stretched * (1 - single) + values * single).to(torch.uint8)


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


def _contrast_tables(images: Tensor, factor: np.ndarray) -> Tensor:
    """Return tables [n, 3, 256], uint8, that scale the distance to the rounded mean brightness."""
    pixels = images.shape[2] * images.shape[3]
    total = _luma(images.float()).sum((2, 3), keepdim=True, dtype=torch.float64)
    grey = (total / pixels + 0.5).floor().float()[..., 0]
    values = torch.arange(256, device=images.device, dtype=torch.float32)
    return _bytes(_blend(grey, values, to_device(factor[:, None, None], images.device))).expand(
        -1, 3, -1
    )


def _luma(pixels: Tensor) -> Tensor:
    """Return the brightness [n, 1, S, S] of [n, 3, S, S]; both are whole numbers in float32."""
    weighted = (pixels * _colours(pixels, LUMA)).sum(1, keepdim=True)
    return weighted.add_(32768).mul_(1 / 65536).floor_()


def _blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """Return start + factor * (end - start) in float32, rounding each step as Pillow does.

    `lerp` fuses the steps, which sometimes moves a result across a whole number.
    """
    return (end - start).mul_(factor.float()).add_(start)


# Kinds 2 and 3: blends with gray and with a smoothed image.


def _color(images: Tensor, names: list[str], factor: np.ndarray) -> Tensor:
    pixels = images.float()
    return _bytes(
        _blend(_luma(pixels), pixels, to_device(factor[:, None, None, None], images.device))
    )


def _sharpness(images: Tensor, names: list[str], factor: np.ndarray) -> Tensor:
    """Blend with Pillow's SMOOTH, (1 1 1; 1 5 1; 1 1 1) / 13, which does not change the border."""
    if images.shape[3] < 3:
        return images
    values = images.short()
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1]
    total += rows[..., 2:]
    inner = values[:, :, 1:-1, 1:-1]
    total.add_(inner, alpha=4)
    # Rounding in float32 is exact: (total + 6.5) / 13 is never a whole number.
    smooth = total.float().add_(6.5).mul_(1 / 13).floor_()
    blended = _blend(smooth, inner.float(), to_device(factor[:, None, None, None], images.device))
    images[:, :, 1:-1, 1:-1] = _bytes(blended)
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


def _filled(values: Tensor, inside: Tensor) -> Tensor:
    """Convert float32 [n, 3, ...] to uint8; fill where `inside` (0 or 1, float32) is 0.

    On a CPU, arithmetic is several times faster than `where`.
    """
    fill = _colours(values, FILL).view(1, 3, *[1] * (values.dim() - 2))
    return _bytes(values.sub_(fill).mul_(inside).add_(fill).add_(SLACK))


def _shift(images: Tensor, names: list[str], level: np.ndarray) -> Tensor:
    """Shear or translate along rows; operations along columns, the last ones, are transposed."""
    size = images.shape[3]
    along_rows = sum(name.endswith(("X", "XRel")) for name in names)
    images[along_rows:] = images[along_rows:].mT.clone()
    centres = np.arange(size) + 0.5
    is_shear = np.array([name.startswith("Shear") for name in names])
    # [n, S]: horizontal offset, in pixels, of the source of each row. Beyond the side everything is
    # filled, so larger offsets are clipped.
    shift = level[:, None] * np.where(is_shear[:, None], centres, size)
    shift = shift.clip(-size - 1, size + 1)
    whole = np.floor(shift)
    offset = to_device((shift - whole).astype(np.float32)[:, None, :, None], images.device)
    weights = _cubic(offset)
    windows = _windows(images, whole.astype(np.int64)).float()
    values = windows[..., :size] * weights[0]
    for tap in range(1, 4):
        values.addcmul_(windows[..., tap : tap + size], weights[tap])
    source = centres + shift[..., None]
    is_inside = ((source >= 0) & (source < size)).astype(np.float32)
    inside = to_device(is_inside[:, None], images.device)
    moved = _filled(values, inside)
    moved[along_rows:] = moved[along_rows:].mT.clone()
    return moved


def _windows(images: Tensor, shift: np.ndarray) -> Tensor:
    """Return [n, 3, S, S + 3], uint8: the four taps of each pixel, rows shifted by whole pixels.

    All rows, with repeated ends, are in one buffer, and one `index_select` on an overlapping view
    shifts them. Pixels taken from neighbouring rows are filled later.
    """
    count, _, size, _ = images.shape
    width, margin = size + 4, size + 2
    length = count * 3 * size * width
    buffer = images.new_zeros(margin + length + margin)
    rows = buffer[margin : margin + length].view(count, 3, size, width)
    rows[..., 2:-2] = images
    rows[..., :2] = images[..., :1]
    rows[..., -2:] = images[..., -1:]
    first = margin + 1 + width * np.arange(count * 3 * size).reshape(count, 3, size)
    starts = to_device((first + shift[:, None]).ravel(), images.device)
    view = buffer.as_strided((len(buffer) - width + 2, width - 1), (1, 1))
    return view.index_select(0, starts).view(count, 3, size, width - 1)


def _rotate(images: Tensor, names: list[str], degrees: np.ndarray) -> Tensor:
    """Rotate counterclockwise about the centre."""
    count, _, size, _ = images.shape
    device = images.device
    angle = -np.radians(degrees % 360)[:, None]
    cosine, sine = np.cos(angle).round(15), np.sin(angle).round(15)
    centres, middle = np.arange(size) + 0.5, size / 2
    # The source of a pixel, in double precision: a term of its column plus a term of its row.
    x_column, y_column = cosine * centres, -sine * centres
    x_row = sine * centres + (middle - middle * (cosine + sine))
    y_row = cosine * centres + (middle - middle * (cosine - sine))
    x = to_device(x_column[:, None, :], device) + to_device(x_row[:, :, None], device)
    y = to_device(y_column[:, None, :], device) + to_device(y_row[:, :, None], device)
    inside = ((x >= 0) & (x < size) & (y >= 0) & (y < size)).float().view(count, 1, -1)
    (column, across), (row, down) = (_split(p.view(count, 1, -1), size) for p in (x, y))
    width = size + 4
    planes = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").flatten(2)
    last = 3 * width + 3
    index = row.mul_(width).add_(column).expand(-1, 3, -1)
    across_weights, values = _cubic(across), torch.zeros_like(planes[..., : size * size])
    for j, weight in enumerate(_cubic(down)):
        line = torch.zeros_like(values)
        for i in range(4):
            first = j * width + i
            taps = planes[..., first : planes.shape[2] - last + first].gather(2, index)
            line.addcmul_(taps, across_weights[i])
        values.addcmul_(line, weight)
    return _filled(values, inside).view_as(images)


def _split(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the index of the first of four taps, in an image padded by 2, and the offset."""
    position = position.clamp(0, size) - 0.5
    whole = position.floor()
    return (whole + 1).long(), (position - whole).float()


# Operations that are applied together, and the function that applies them.
KINDS = (
    (
        (
            "AutoContrast",
            "Equalize",
            "ContrastIncreasing",
            "Invert",
            "PosterizeIncreasing",
            "SolarizeIncreasing",
            "SolarizeAdd",
            "BrightnessIncreasing",
        ),
        _by_table,
    ),
    (("ColorIncreasing",), _color),
    (("SharpnessIncreasing",), _sharpness),
    (("ShearX", "TranslateXRel", "ShearY", "TranslateYRel"), _shift),
    (("Rotate",), _rotate),
)
