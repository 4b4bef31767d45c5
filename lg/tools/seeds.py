"""`--seeds 1 2 3`: train a config with several seeds, and report means and 95 % intervals."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from yacs.config import CfgNode

from lg.config import load_config
from lg.errors import ConfigError
from lg.files.atomic import write_text
from lg.logs.log import read_run_lines
from lg.tools.intervals import mean_interval

# Rows of the table: key of a result, its title, and whether the table shows 100 minus the value.
ROWS = {
    "top1_err": ("top-1", True),
    "balanced_acc": ("balanced accuracy", False),
    "macro_f1": ("macro-F1", False),
    "calibration_err": ("expected calibration error", False),
}


def train_seeds(
    path: str, opts: Sequence[str], seeds: Sequence[int], train: Callable[[CfgNode], None]
) -> None:
    """Train a config once per seed, one after the other; print a table and write seeds.json.

    Seed N trains in OUT_DIR/seed_N. Finished seeds are read, and interrupted ones resumed.

    Args:
        path: The config.
        opts: Overrides, KEY VALUE KEY VALUE ...
        seeds: Values of RNG_SEED.
        train: Trains a config.

    Raises:
        ConfigError: A seed is repeated, or the runs would not run one after the other here.
    """
    cfg = load_config(path, opts)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds is {' '.join(map(str, seeds))}: give each seed once.")
    if cfg.LAUNCH.MODE != "local" or "RANK" in os.environ:
        raise ConfigError(
            "--seeds trains one run after the other on this machine: set LAUNCH.MODE local and "
            "NUM_GPUS instead of a cluster job or torchrun, or start each RNG_SEED on its own."
        )
    results = {}
    for seed in seeds:
        folder = os.path.join(cfg.OUT_DIR, f"seed_{seed}")
        run = load_config(path, [*opts, "RNG_SEED", str(seed), "OUT_DIR", folder])
        print(f"Seed {seed}: {folder}", flush=True)
        train(run)
        results[seed] = read_result(folder, validated=run.TRAIN.VAL_FRACTION > 0)
    summary = summarize(list(results.values()))
    print("\n".join(table(results, summary)))
    content = {"config": path, "seeds": results, "summary": summary}
    write_text(os.path.join(cfg.OUT_DIR, "seeds.json"), json.dumps(content, indent=1))


def read_result(folder: str, *, validated: bool) -> dict[str, Any]:
    """Return the result of a finished run from its log, with its split and how it was chosen.

    It is the final test; without one, the best test (of the weights or their average) if held-out
    images chose the weights, and else that of the last epoch, because the best of many tests on
    the test set is optimistic.
    """
    lines = read_run_lines(os.path.join(folder, "log.txt"))
    final = [line for line in lines if line["_type"] == "final_test"]
    tests = [line for line in lines if line["_type"] == "test_epoch"]
    if final:
        line, choice = final[-1], "best epoch, chosen on other images"
    elif validated:
        tests += [line for line in lines if line["_type"] == "test_ema_epoch"]
        line, choice = min(tests, key=lambda test: test["top1_err"]), "best epoch, chosen on them"
    else:
        line, choice = tests[-1], "last epoch"
    return {"split": line["split"], "choice": choice, **{key: line[key] for key in ROWS}}


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return the mean of each number, and half its 95 % interval (Student t); None for one run."""
    summary = {}
    for key in ROWS:
        mean, half = mean_interval([float(result[key]) for result in results])
        summary[key] = {"mean": mean, "interval95": half}
    return summary


def table(
    results: dict[int, dict[str, Any]], summary: dict[str, dict[str, float | None]]
) -> list[str]:
    """Return the lines of the table."""
    first = next(iter(results.values()))
    width = max(len(title) for title, _ in ROWS.values())
    seeds = "".join(f"{f'seed {seed}':>10}" for seed in results)
    lines = [
        f"{first['split']}, {first['choice']}, percent",
        f"{'':<{width}}{seeds}   mean and 95 % interval",
    ]
    for key, (title, is_error) in ROWS.items():
        mean, half = (summary[key][name] for name in ("mean", "interval95"))
        shown = [100 - r[key] if is_error else r[key] for r in results.values()]
        assert mean is not None
        interval = "" if half is None else f" ± {half:.2f}"
        lines.append(
            f"{title:<{width}}{''.join(f'{value:>10.2f}' for value in shown)}   "
            f"{100 - mean if is_error else mean:.2f}{interval}"
        )
    return lines
