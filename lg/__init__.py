"""lg: vision transformers from scratch on tiny datasets, guided by a small frozen CNN.

The names in `__all__` are the stable Python surface. They are imported on first use, so `import lg`
is fast.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load_config": "lg.config.load",
    "build_model": "lg.builders",
    "build_guided": "lg.builders",
    "feature_maps": "lg.models.taps",
    "attention_maps": "lg.models.attention",
    "load_weights": "lg.checkpoint",
    "load_predictor": "lg.tools.predict",
    "evaluate": "lg.tools.predict",
    "published_state_dict": "lg.models.published",
    "load_published_state_dict": "lg.models.published",
}

__all__ = [*_HOMES, "guidance"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "guidance":
        return importlib.import_module("lg.guidance")
    raise AttributeError(f"module 'lg' has no attribute {name!r}")
