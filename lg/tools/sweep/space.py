"""The settings that a sweep varies: log:LOW:HIGH, lin:LOW:HIGH or A,B,C in place of a value."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial
from yacs.config import CfgNode

from lg.config import load_config
from lg.config.defaults import FREE_ON_RESUME, flatten
from lg.errors import ConfigError

Space = dict[str, BaseDistribution]  # key -> the values it may take
_RANGE = re.compile(r"(?P<scale>log|lin):(?P<low>[^:]+):(?P<high>[^:]+)")


@dataclass(frozen=True)
class Sweep:
    """What all workers of a sweep share.

    Attributes:
        path: The config.
        fixed: Overrides that are the same in all trials.
        space: What varies.
        total: Number of trials.
        is_grid: Whether the trials are all combinations of the choices; these are not pruned.
        out_dir: Folder of the sweep.
        storage: URL of a database; None: a journal in `out_dir`.
        seed: Of the samplers.
        warmup: Epochs in which no trial is pruned.
    """

    path: str
    fixed: list[str]
    space: Space
    total: int
    is_grid: bool
    out_dir: str
    storage: str | None
    seed: int
    warmup: int


def read_space(path: str, opts: Sequence[str]) -> tuple[Space, list[str], CfgNode]:
    """Read the command line of a sweep and check the ends of each range, and each choice.

    Args:
        path: The config.
        opts: KEY VALUE KEY VALUE ...

    Returns:
        What varies; the overrides that are the same in all trials; the config of one point.

    Raises:
        ConfigError: Nothing varies, a value is not allowed, or a key does not change the result.
    """
    pairs = dict(zip(opts[::2], opts[1::2], strict=False))
    parts = {key: _parts(value) for key, value in pairs.items()}
    varied = {key: values for key, values in parts.items() if len(values) > 1}
    fixed = [word for key in pairs if key not in varied for word in (key, pairs[key])]
    first = {key: values[0] for key, values in varied.items()}
    # The last word of an odd number makes load_config explain the pairs.
    cfg = load_config(path, [*fixed, *flat(first), *(opts[-1:] if len(opts) % 2 else ())])
    if not varied:
        raise ConfigError(
            "--mode sweep varies nothing: give a key several values, such as OPTIM.BASE_LR "
            "log:1e-4:1e-2 or DISTILLATION.INTER_WEIGHT 1,2.5,5."
        )
    space: Space = {}
    for key, values in varied.items():
        if key.startswith(FREE_ON_RESUME) or key in ("NUM_GPUS", "DEVICE"):
            raise ConfigError(
                f"{key} is {pairs[key]}, but it does not change the result, so a sweep cannot vary "
                "it: give it one value (quote a text with commas: \"'a,b'\")."
            )
        points = [load_config(path, [*fixed, *flat({**first, key: value})]) for value in values]
        loaded = [dict(flatten(point))[key] for point in points]
        match = _RANGE.fullmatch(pairs[key])
        space[key] = (
            _range(key, pairs[key], match["scale"], *loaded)
            if match
            else _choices(key, pairs[key], values)
        )
    return space, fixed, cfg


def flat(values: Mapping[str, Any]) -> list[str]:
    """Return overrides as KEY VALUE KEY VALUE ..."""
    return [word for key, value in values.items() for word in (key, str(value))]


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """Return the values of a trial; those that it has already stay."""
    values: dict[str, Any] = {}
    for key, allowed in space.items():
        if isinstance(allowed, CategoricalDistribution):
            values[key] = trial.suggest_categorical(key, allowed.choices)
        elif isinstance(allowed, IntDistribution):
            values[key] = trial.suggest_int(key, allowed.low, allowed.high, log=allowed.log)
        else:
            assert isinstance(allowed, FloatDistribution)
            values[key] = trial.suggest_float(key, allowed.low, allowed.high, log=allowed.log)
    return values


def trial_config(
    path: str, fixed: Sequence[str], values: Mapping[str, Any], out_dir: str
) -> CfgNode:
    """Load the config of a trial, which one process runs in a folder of its own.

    Args:
        path: The config of the sweep.
        fixed: Overrides that are the same in all trials.
        values: Those of the trial.
        out_dir: Its folder.
    """
    quiet = () if "LOG_DEST" in fixed[::2] else ("LOG_DEST", "file")
    place = flat({"OUT_DIR": out_dir, "NUM_GPUS": 1, "LAUNCH.MODE": "local"})
    return load_config(path, [*fixed, *quiet, *flat(values), *place])


def trial_folder(out_dir: str, number: int) -> str:
    """Return the folder of a trial, counted from 0."""
    return os.path.join(out_dir, f"trial_{number:03d}")


def _parts(text: str) -> list[str]:
    """Split a value into the ends of its range, or its choices, at commas outside brackets."""
    match = _RANGE.fullmatch(text)
    if match:
        return [match["low"], match["high"]]
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if sign == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += sign
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "[(") - (sign in "])")
    return [part.strip() for part in parts]


def _range(key: str, text: str, scale: str, low: Any, high: Any) -> BaseDistribution:
    if type(low) is not type(high) or type(low) not in (int, float):
        raise ConfigError(f"{key} is {text}, but it takes no numbers: list its values, as A,B,C.")
    if not low < high or (scale == "log" and low <= 0) or not math.isfinite(high):
        above = " above 0" if scale == "log" else ""
        raise ConfigError(f"{key} is {text}: give {scale}:LOW:HIGH with LOW below HIGH{above}.")
    kind = IntDistribution if isinstance(low, int) else FloatDistribution
    return kind(low, high, log=scale == "log")


def _choices(key: str, text: str, values: list[str]) -> BaseDistribution:
    if len(set(values)) < len(values):
        raise ConfigError(f"{key} is {text}: give each value once.")
    return CategoricalDistribution(values)
