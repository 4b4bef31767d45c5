"""Position embeddings of weights that were trained at another image size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from torch import Tensor

_NAME = re.compile(r"(^|\.)pos_embed\d*$")
_MAX_PREFIX = 2  # class token, distillation token


def resample_positions(weights: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the absolute position embeddings of weights that fit after resampling (bicubic).

    Args:
        weights: Weights under their published names.
        like: Those of a model of another image size: [1, N, C] for square grids of tokens after up
            to two other tokens, whose embeddings stay, or [1, C, S, S].

    Returns:
        Embeddings that differ from the model's only in the size of their grid, resampled.
    """
    return {
        name: fitted
        for name, new in like.items()
        if _NAME.search(name)
        and isinstance(old := weights.get(name), Tensor)
        and old.shape != new.shape
        and (fitted := _resample(old, new)) is not None
    }


def _resample(old: Tensor, new: Tensor) -> Tensor | None:
    is_grid = all(table.ndim == 4 and table.shape[2] == table.shape[3] for table in (old, new))
    if is_grid and old.shape[:2] == new.shape[:2]:
        size = [*new.shape[2:]]
        return resample_abs_pos_embed_nhwc(old.movedim(1, -1), size).movedim(-1, 1)
    if old.ndim == new.ndim == 3 and old.shape[::2] == new.shape[::2]:
        for prefix in range(_MAX_PREFIX + 1):
            sides = [math.isqrt(max(table.shape[1] - prefix, 0)) for table in (old, new)]
            counts = [side**2 + prefix for side in sides]
            if min(sides) > 0 and counts == [old.shape[1], new.shape[1]]:
                return resample_abs_pos_embed(old, [sides[1]] * 2, num_prefix_tokens=prefix)
    return None
