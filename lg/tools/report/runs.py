"""What the log of a run says about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lg.config.defaults import DEFAULT_VALUES, FREE_ON_RESUME, flatten
from lg.errors import DataError
from lg.logs.log import epoch_number, epoch_seconds, read_run_lines

Line = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run as its log describes it; epochs that were trained again count once.

    Attributes:
        name: Short and unique among the runs of a report.
        folder: OUT_DIR.
        config: Key -> value, such as {"OPTIM.BASE_LR": 0.001}.
        cost: `params` and `macs` (multiply-adds for one image) of the model; may be empty.
        machine: Where it was trained; may be empty.
        training: Epoch (from 1) -> means of the epoch.
        tests: Epoch -> result of its test.
        average_tests: Epoch -> result of the test of the weight average.
        final: Result of the final test of the best weights; empty if there was none.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    cost: Line
    machine: Line
    training: dict[int, Line]
    tests: dict[int, Line]
    average_tests: dict[int, Line]
    final: Line

    @property
    def weights(self) -> Path:
        """The best weights."""
        return self.folder / "model.pyth"

    @property
    def hours(self) -> float:
        """Hours of training and of its tests; 0 if no epoch was finished."""
        lines = (*self.training.values(), *self.tests.values(), *self.average_tests.values())
        return epoch_seconds(lines) / 3600

    @property
    def length(self) -> int:
        """OPTIM.MAX_EPOCH."""
        return int(self.config.get("OPTIM.MAX_EPOCH", 0))

    def series(
        self, group: str, key: str, change: Callable[[float], float] = float
    ) -> tuple[list[int], list[float]]:
        """Return epochs and values of a key of `training`, `tests` or `average_tests`."""
        lines: dict[int, Line] = getattr(self, group)
        known = {epoch: line[key] for epoch, line in lines.items() if line.get(key) is not None}
        return [*known], [change(value) for value in known.values()]


def read_runs(folders: Sequence[str]) -> list[RunRecord]:
    """Read the logs of several runs.

    Raises:
        DataError: A folder has no log of a run, or is given twice.
    """
    paths = [Path(os.path.expanduser(folder)) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise DataError(f"The folders are {' '.join(folders)}: give each run once.")
    return [_read(path, name) for path, name in zip(paths, _short_names(paths), strict=True)]


def _read(folder: Path, name: str) -> RunRecord:
    log = folder / "log.txt"
    if not log.is_file():
        inside = sorted(str(path.parent) for path in folder.glob("*/log.txt"))
        hint = (
            f"Name the runs inside: {' '.join(inside)}." if inside else "Name the OUT_DIR of a run."
        )
        raise DataError(f"{folder} is not the folder of a run: it has no log.txt. {hint}")
    lines = read_run_lines(log)
    kinds: dict[str, list[Line]] = {}
    for line in lines:
        kinds.setdefault(str(line.pop("_type", "")), []).append(line)
    config = _last(kinds, "cfg") or _read_config(folder / "config.yaml")
    if not config:
        raise DataError(
            f"{folder} has no config: {log} is not the log of a training, or was cut off before "
            "training began."
        )
    return RunRecord(
        name=name,
        folder=folder,
        config=dict(flatten(config)),
        cost=_last(kinds, "complexity"),
        machine=_last(kinds, "machine"),
        training=_by_epoch(kinds.get("train_epoch", [])),
        tests=_by_epoch(kinds.get("test_epoch", [])),
        average_tests=_by_epoch(kinds.get("test_ema_epoch", [])),
        final=_last(kinds, "final_test"),
    )


def _read_config(path: Path) -> Line:
    """Return the config that training wrote; empty if there is none."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _last(kinds: dict[str, list[Line]], kind: str) -> Line:
    return kinds[kind][-1] if kind in kinds else {}


def _by_epoch(lines: Sequence[Line]) -> dict[int, Line]:
    return {epoch_number(line): line for line in lines}  # in order, see `read_run_lines`


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def changed_settings(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return the keys in which runs differ, with the value of each run.

    Keys that change no result are left out. A run of a version without a key has its default.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    values = {key: [run.config.get(key, DEFAULT_VALUES.get(key)) for run in runs] for key in keys}
    return {
        key: row
        for key, row in values.items()
        if any(value != row[0] for value in row) and not key.startswith(FREE_ON_RESUME)
    }


def own_settings(run: RunRecord) -> dict[str, Any]:
    """Return the keys that a run sets to something else than their default, with the values."""
    return {
        key: value
        for key, value in run.config.items()
        if key not in DEFAULT_VALUES or value != DEFAULT_VALUES[key]
    }
