"""Crop and flip stored feature maps as images were cropped and flipped.

Shapes: N batch, V stored views, C channels, H and W the map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def from_nearest(view: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Find the stored view closest to each view, and the view that leads from one to the other.

    The closest view is flipped alike if possible; then the sum of the distances between the sides
    of the boxes is smallest.

    Args:
        view: [N, 5], see `lg.augment.view.View`.
        stored: [V, 5].

    Returns:
        Positions in `stored` [N]; views [N, 5] to apply to those.
    """
    sides, stored_sides = (
        torch.cat([v[:, :2], v[:, :2] + v[:, 2:4], 1e3 * v[:, 4:]], dim=1) for v in (view, stored)
    )
    nearest = (sides[:, None] - stored_sides).abs().sum(dim=2).argmin(dim=1)
    top, left, height, width, flip = view.unbind(dim=1)
    top_0, left_0, height_0, width_0, flip_0 = stored[nearest].unbind(dim=1)
    top, height = (top - top_0) / height_0, height / height_0
    left, width = (left - left_0) / width_0, width / width_0
    left = torch.where(flip_0 > 0.5, 1 - left - width, left)  # in a mirrored image
    return nearest, torch.stack([top, left, height, width, (flip - flip_0).abs()], dim=1)


def replay(maps: Tensor, view: Tensor) -> Tensor:
    """Crop and flip maps in one bilinear resampling; each box is resized to the map's own size.

    Pixel centres correspond as in `torch.nn.functional.interpolate` with align_corners False, so
    the full view returns the maps themselves. Values outside the map repeat its border.

    Args:
        maps: [N, C, H, W], any float type.
        view: [N, 5], see `lg.augment.view.View`.

    Returns:
        [N, C, H, W], float32.
    """
    rows, columns = (
        (torch.arange(side, device=maps.device) + 0.5) / side for side in maps.shape[2:]
    )
    # Mixed precision would round coordinates by several percent of a pixel. The matrix product of
    # `affine_grid` runs in it, and in TF32.
    with torch.autocast(maps.device.type, enabled=False):
        top, left, height, width, flip = view.float()[..., None].unbind(dim=1)  # [N, 1]
        columns = torch.where(flip > 0.5, 1 - columns, columns)
        # Coordinates run from -1 to 1 over the whole map.
        down, across = 2 * (top + height * rows) - 1, 2 * (left + width * columns) - 1
        shape = (len(maps), *maps.shape[2:])
        grid = torch.stack([across[:, None, :].expand(shape), down[:, :, None].expand(shape)], 3)
        return F.grid_sample(maps.float(), grid, padding_mode="border", align_corners=False)
