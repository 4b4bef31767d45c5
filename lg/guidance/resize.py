"""Bilinear resizing of images and feature maps, as `F.interpolate` with align_corners False."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images or maps [N, C, H, W] to a height and width.

    With `torch.use_deterministic_algorithms`, the result is a product with constant matrices,
    because the gradient of `F.interpolate` depends on the order of atomic additions on GPUs.
    """
    old = (features.shape[2], features.shape[3])
    if old == size:
        return features
    (rows, rest_of_rows), (columns, rest_of_columns) = map(divmod, old, size)
    if not (rest_of_rows or rest_of_columns) and rows % 2 == columns % 2 == 1:
        # The centre of an odd number of pixels is a pixel: nothing to interpolate.
        return features[:, :, rows // 2 :: rows, columns // 2 :: columns]
    if torch.are_deterministic_algorithms_enabled():
        down, across = (
            _weights(a, b, features.dtype, features.device) for a, b in zip(old, size, strict=True)
        )
        with torch.autocast(features.device.type, enabled=False):
            return down @ features @ across.T
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


@lru_cache(maxsize=32)
def _weights(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix [new, old] that interpolates linearly along one side."""
    units = torch.eye(old, dtype=dtype).unsqueeze(0)
    return F.interpolate(units, size=new, mode="linear")[0].T.contiguous().to(device)
