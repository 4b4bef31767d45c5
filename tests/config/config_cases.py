"""Helpers shared by the config tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import lg
from lg.config import flatten
from lg.errors import ConfigError

REFERENCE = Path(__file__).parents[1] / "reference"
PUBLISHED_DEFAULTS = yaml.safe_load((REFERENCE / "config_defaults.yaml").read_text())
PUBLISHED_CONFIGS = json.loads((REFERENCE / "original_configs.json").read_text())

Write = Callable[..., Path]


def fault(path: str | os.PathLike[str], *opts: Any) -> str:
    """Load, and return the message of the ConfigError: one short line, without a traceback."""
    with pytest.raises(ConfigError) as caught:
        lg.load_config(path, opts)
    text = str(caught.value)
    assert 0 < len(text) < 600 and "\n" not in text and "Traceback" not in text
    # Python would print a chained exception as well.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return text


def leaf(cfg: Any, key: str) -> Any:
    return dict(flatten(cfg))[key]


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of flat SECTION.KEY values."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree
