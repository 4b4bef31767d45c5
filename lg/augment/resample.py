"""Crop and resize batches, each image with its own box, like Pillow's bicubic filter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lg.device import to_device, to_device_together

# On a GPU, images up to this side (pixels) are resized together by matrix products, with a few
# kernel launches per batch instead of per image. On a CPU, a loop is three times as fast.
MATRIX_SIDE = 96


def crop_and_resize(
    images: Tensor | Sequence[Tensor], boxes: np.ndarray, size: int, flip: np.ndarray
) -> Tensor:
    """Crop images, resize them (bicubic, antialiased) to size x size, then flip them.

    Args:
        images: [N, H, W, C], or N images [H, W, C] of any sizes; uint8, or float32 from 0 to 255.
        boxes: [N, 4], top, left, height and width in pixels, within the images; in host memory.
        size: Side of the result in pixels.
        flip: [N], whether to flip the result; in host memory.

    Returns:
        [N, C, size, size] of the same type, on the device of the images.
    """
    if isinstance(images, Tensor) and images.is_cuda and max(images.shape[1:3]) <= MATRIX_SIDE:
        return resize_together(images, boxes, size, flip)
    if images[0].is_cuda:
        return resize_one_by_one(images, boxes, size, flip)
    out = torch.empty(len(images), images[0].shape[2], size, size, dtype=images[0].dtype)
    for row, (image, box, mirrored) in enumerate(zip(images, boxes.tolist(), flip, strict=True)):
        resized = _resize(image, box, size)
        out[row] = resized.flip(2) if mirrored else resized
    return out if out.dtype == torch.uint8 else out.clamp_(0, 255)


def _resize(image: Tensor, box: Sequence[int], size: int, *, in_float: bool = False) -> Tensor:
    """Crop and resize one image [H, W, C] to [C, size, size]."""
    top, left, height, width = box
    crop = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
    if in_float:
        crop = crop.float()
    if height == width == size:
        return crop[0]
    return F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0]


def resize_one_by_one(
    images: Tensor | Sequence[Tensor], boxes: np.ndarray, size: int, flip: np.ndarray
) -> Tensor:
    """Compute `crop_and_resize` with two kernel launches per image; the rest is done together."""
    # The GPU filter does not support uint8.
    pairs = zip(images, boxes.tolist(), strict=True)
    resized = [_resize(image, box, size, in_float=True) for image, box in pairs]
    out = _levels(torch.stack(resized), images[0].dtype).to(images[0].dtype)
    mirrored = to_device(flip[:, None, None, None], out.device)
    return torch.where(mirrored, out.flip(3), out)


def resize_together(images: Tensor, boxes: np.ndarray, size: int, flip: np.ndarray) -> Tensor:
    """Compute `crop_and_resize` of images of one size by matrix products."""
    count, height, width, channels = images.shape
    device = images.device
    box, mirrored = to_device_together([boxes.astype(np.float32), flip[:, None, None]], device)
    start, length = box[:, :2].mT.flatten(), box[:, 2:].mT.flatten()  # of rows, then of columns
    if height == width:
        rows, columns = cubic_matrices(start, length, height, size).chunk(2)
    else:
        rows = cubic_matrices(start[:count], length[:count], height, size)
        columns = cubic_matrices(start[count:], length[count:], width, size)
    columns = torch.where(mirrored, columns.flip(1), columns)
    # Pillow resizes the rows first and rounds in between.
    pixels = images.permute(0, 3, 1, 2).reshape(count, channels * height, width).float()
    across = torch.bmm(pixels, columns.mT)
    if images.dtype == torch.uint8:
        across = _levels(across, torch.uint8)
    across = across.view(count, channels, height, size).transpose(1, 2)
    out = _levels(torch.bmm(rows, across.reshape(count, height, channels * size)), images.dtype)
    out = out.to(images.dtype).view(count, size, channels, size)
    return out.transpose(1, 2).contiguous()


def _levels(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Clip to 0..255, in place; round unless the images are float32."""
    return (values if dtype == torch.float32 else values.round_()).clamp_(0, 255)


def cubic_matrices(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Return matrices that resize an interval of a row or column.

    The kernel is Keys's with a = -1/2, widened for downsampling and cut off at the ends of the
    interval.

    Args:
        start: [N], first pixel of the interval.
        length: [N], its length in pixels.
        source: Pixels of the whole row or column.
        size: Pixels of the result.

    Returns:
        [N, size, source], float32; rows sum to 1.
    """
    start, length = start[:, None, None], length[:, None, None]
    position = torch.arange(source, device=start.device) - start  # in the interval
    scale = length / size
    widening = scale.clamp(min=1)
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    first = (centre - 2 * widening + 0.5).floor().clamp(min=0)
    last = torch.minimum((centre + 2 * widening + 0.5).floor(), length)
    x = ((position + 0.5 - centre) / widening).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    weights = weights * ((position >= first) & (position < last))
    return weights / weights.sum(dim=2, keepdim=True)
