"""Helpers of the checkpoint tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def small_state(value: float = 1.0) -> dict[str, Any]:
    return {
        "epoch": 3,
        "test_err": 12.5,
        "ema_err": 100.0,
        "cfg": "DESC: é\n",
        "model_state": {"w": torch.full((5, 4), value), "n": torch.tensor(7)},
        "ema_state": {},
        "nested": [1, (2.5, None, True), {"a": "b"}],
    }


def same_state(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same_state(ours[k], theirs[k]) for k in ours)
    return type(ours) is type(theirs) and ours == theirs


def saved(path: Path, state: Any = None) -> Path:
    torch.save(small_state() if state is None else state, path)
    return path
