"""The operations of RandAugment on byte tensors, in four kinds, by Pillow's rules for pixels.

Results are cut off, not rounded, and what an image is moved away from is filled. Each kind takes
images [n, 3, S, S] of uint8 that it may overwrite, the names of their operations (sorted as KINDS
lists them) and their levels [n], float64, and returns uint8 of the same shape. What the host knows
is copied to the device without waiting; nothing is read back.

Letters in shapes: n samples of one kind, S side, P = S * S pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor

FILL = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
LUMA = (19595.0, 38470.0, 7471.0)  # of 65536; every sum of theirs is a whole number in float32
# Float32 may land just below the whole number that Pillow's double reaches; both are truncated.
SLACK = 1e-4


def to_device(images: Tensor, array: np.ndarray) -> Tensor:
    """A host array on the device of the images; the copy is queued, nobody waits for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if images.is_cuda:
        return tensor.pin_memory().to(images.device, non_blocking=True)
    return tensor.to(images.device)


def _colours(images: Tensor, values: tuple[float, ...]) -> Tensor:
    """[3, 1, 1], float32."""
    return to_device(images, np.array(values, dtype=np.float32)[:, None, None])


def _bytes(values: Tensor) -> Tensor:
    """Float32 to uint8 as Pillow does it: cut off, not rounded."""
    return values.clamp_(0, 255).to(torch.uint8)


# Kind 1: every channel of a sample goes through a table of 256 values.


def _by_table(images: Tensor, names: list[str], level: np.ndarray) -> Tensor:
    index = images.flatten(2).long()
    # They are sorted as KINDS lists them: three that depend on the image, then the rest.
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
        tables.append(to_device(images, fixed)[:, None].expand(-1, 3, -1))
    return torch.cat(tables).gather(2, index).view_as(images)


def _fixed_table(name: str, level: float) -> np.ndarray:
    """[256], uint8: a table that does not depend on the image."""
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
    """[n, 3, 256], uint8: stretches the range of each channel; one of a single value stays."""
    low, high = (x[..., None].double() for x in images.flatten(2).aminmax(dim=2))
    values = torch.arange(256, device=images.device, dtype=torch.float64)
    # `255 / tensor` would multiply by a reciprocal, and be a bit off now and then.
    scale = torch.full_like(low, 255).div_((high - low).clamp(min=1))
    stretched = (values * scale + -low * scale).clamp_(0, 255)
    # Not `where` on a condition: low is 0 and scale 1 where the channel has one value only.
    single = (high == low).double()
    return (stretched * (1 - single) + values * single).to(torch.uint8)


def _equalize_tables(index: Tensor) -> Tensor:
    """[n, 3, 256], uint8, for pixels [n, 3, P], int64; a channel of too few values stays."""
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
    """[n, 3, 256], uint8: away from, or to, the mean brightness, a whole number."""
    pixels = images.shape[2] * images.shape[3]
    total = _luma(images.float()).sum((2, 3), keepdim=True, dtype=torch.float64)
    grey = (total / pixels + 0.5).floor().float()[..., 0]
    values = torch.arange(256, device=images.device, dtype=torch.float32)
    return _bytes(_blend(grey, values, to_device(images, factor[:, None, None]))).expand(-1, 3, -1)


def _luma(pixels: Tensor) -> Tensor:
    """Brightness [n, 1, S, S] of [n, 3, S, S], both float32 of whole numbers, as Pillow rounds."""
    weighted = (pixels * _colours(pixels, LUMA)).sum(1, keepdim=True)
    return weighted.add_(32768).mul_(1 / 65536).floor_()


def _blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """Start + factor * (end - start) in float32, each step rounded as Pillow's is (`lerp` fuses
    them, which moves a result across a whole number now and then)."""
    return (end - start).mul_(factor.float()).add_(start)


# Kinds 2 and 3: blends with grey and with a smoothed image.


def _color(images: Tensor, names: list[str], factor: np.ndarray) -> Tensor:
    pixels = images.float()
    return _bytes(_blend(_luma(pixels), pixels, to_device(images, factor[:, None, None, None])))


def _sharpness(images: Tensor, names: list[str], factor: np.ndarray) -> Tensor:
    """Pillow's SMOOTH, (1 1 1; 1 5 1; 1 1 1) / 13, which leaves the border as it is."""
    if images.shape[3] < 3:
        return images
    values = images.short()
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1]
    total += rows[..., 2:]
    inner = values[:, :, 1:-1, 1:-1]
    total.add_(inner, alpha=4)
    # Rounded: (total + 6.5) / 13 is never a whole number, so float32 cannot fall on the wrong side.
    smooth = total.float().add_(6.5).mul_(1 / 13).floor_()
    blended = _blend(smooth, inner.float(), to_device(images, factor[:, None, None, None]))
    images[:, :, 1:-1, 1:-1] = _bytes(blended)
    return images


# Kind 4: moved images, by cubic interpolation between four pixels each way, at the border repeated.


def _cubic(offset: Tensor) -> list[Tensor]:
    """Weights of the pixels at -1, 0, 1, 2 for an offset of 0 to 1.

    Keys's kernel with a = -1: so Pillow's `transform` has it, though its `resize` takes -1/2.
    """
    rest = 1 - offset
    return [
        -offset * rest * rest,
        1 + offset * offset * (offset - 2),
        1 + rest * rest * (rest - 2),
        -rest * offset * offset,
    ]


def _filled(values: Tensor, inside: Tensor) -> Tensor:
    """Float32 [n, 3, ...] to uint8, with the fill colour where `inside` (0 or 1, float32) is 0.

    By arithmetic, which a CPU does several times faster than `where`.
    """
    fill = _colours(values, FILL).view(1, 3, *[1] * (values.dim() - 2))
    return _bytes(values.sub_(fill).mul_(inside).add_(fill).add_(SLACK))


def _shift(images: Tensor, names: list[str], level: np.ndarray) -> Tensor:
    """Shears and translations, along rows; those along columns are transposed (they come last)."""
    size = images.shape[3]
    along_rows = sum(name.endswith(("X", "XRel")) for name in names)
    images[along_rows:] = images[along_rows:].mT.clone()
    centres = np.arange(size) + 0.5
    is_shear = np.array([name.startswith("Shear") for name in names])
    # [n, S], pixels: how far from its column a pixel of this row is taken. Beyond the side all is
    # filled, however far.
    shift = level[:, None] * np.where(is_shear[:, None], centres, size)
    shift = shift.clip(-size - 1, size + 1)
    whole = np.floor(shift)
    offset = to_device(images, (shift - whole).astype(np.float32)[:, None, :, None])
    weights = _cubic(offset)
    windows = _windows(images, whole.astype(np.int64)).float()
    values = windows[..., :size] * weights[0]
    for tap in range(1, 4):
        values.addcmul_(windows[..., tap : tap + size], weights[tap])
    source = centres + shift[..., None]
    inside = to_device(images, ((source >= 0) & (source < size)).astype(np.float32)[:, None])
    moved = _filled(values, inside)
    moved[along_rows:] = moved[along_rows:].mT.clone()
    return moved


def _windows(images: Tensor, shift: np.ndarray) -> Tensor:
    """[n, 3, S, S + 3], uint8: the four taps of every pixel of a row shifted by whole pixels.

    The rows, their ends repeated, lie one after the other in one buffer, and a window may begin at
    any of its bytes: one `index_select` on an overlapping view moves all rows. What it takes from
    neighbouring rows is filled later.
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
    starts = to_device(images, (first + shift[:, None]).ravel())
    view = buffer.as_strided((len(buffer) - width + 2, width - 1), (1, 1))
    return view.index_select(0, starts).view(count, 3, size, width - 1)


def _rotate(images: Tensor, names: list[str], degrees: np.ndarray) -> Tensor:
    """Counterclockwise, about the middle."""
    count, _, size, _ = images.shape
    angle = -np.radians(degrees % 360)[:, None]
    cosine, sine = np.cos(angle).round(15), np.sin(angle).round(15)
    centres, middle = np.arange(size) + 0.5, size / 2
    # The source of a pixel, in double precision: a part for its column, a part for its row.
    x = to_device(images, (cosine * centres)[:, None, :]) + to_device(
        images, (sine * centres + (middle - middle * (cosine + sine)))[:, :, None]
    )
    y = to_device(images, (-sine * centres)[:, None, :]) + to_device(
        images, (cosine * centres + (middle - middle * (cosine - sine)))[:, :, None]
    )
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
    """The first of a pixel's four taps, counted in an image padded by 2, and the offset."""
    position = position.clamp(0, size) - 0.5
    whole = position.floor()
    return (whole + 1).long(), (position - whole).float()


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
