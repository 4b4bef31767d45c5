"""Weights and inputs drawn from fixed seeds, as used for the numbers in tests/reference."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch

_TOKENS = ("cls_token", "pos_embed", "distill_token")


def fill(
    shapes: Mapping[str, Iterable[int]], seed: int = 1, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Draw every tensor of a state dict, seeded by its published name.

    Args:
        shapes: Published name -> shape.
        seed: Seed of the whole set of weights.
        prefix: Prefix of each name before drawing; `teacher.` for the guide.
    """
    return {
        name: torch.from_numpy(_draw(f"{prefix}{name}", tuple(shape), seed))
        for name, shape in shapes.items()
    }


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    noise = np.random.default_rng(zlib.crc32(f"{seed}:{name}".encode())).standard_normal(shape)
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        value = np.zeros(shape)
    elif last == "running_var":
        value = 1 + 0.1 * np.abs(noise)
    elif last.startswith(_TOKENS):
        value = 0.2 * noise
    elif len(shape) >= 2:
        value = noise / math.sqrt(math.prod(shape[1:]))
    elif last == "weight":
        value = (1 + 0.1 * noise) * (0.3 if name.startswith("teacher.") else 1.0)
    else:
        value = 0.1 * noise
    return np.asarray(value, dtype=np.float32)


def reference_input(size: int, seed: int = 1) -> torch.Tensor:
    """Return the fixed batch [2, 3, size, size] of the reference numbers."""
    noise = np.random.default_rng(seed).standard_normal((2, 3, size, size))
    return torch.from_numpy(noise.astype(np.float32))
