"""What a sweep leaves: a table of trials, the best config, and plots."""

from __future__ import annotations

import csv
import io
import os
import shlex
import warnings
from functools import partial
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lg.config import dump_config
from lg.errors import ConfigError
from lg.files.atomic import write_atomically, write_text
from lg.tools.sweep.space import Space, Sweep, flat, trial_config, trial_folder

STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def report(study: optuna.Study, sweep: Sweep) -> None:
    """Print the table of trials; write trials.csv, best.yaml and the plots to the sweep's folder.

    Args:
        study: Its trials are finished.
        sweep: Its settings.

    Raises:
        ConfigError: Every trial failed.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if t.state in STATES]
    trials.sort(key=lambda trial: (list(STATES).index(trial.state), error_of(trial), trial.number))
    rows = [_row(trial, sweep.space) for trial in trials]
    print("\n".join(_table(rows)))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(os.path.join(sweep.out_dir, "trials.csv"), text.getvalue())
    if trials[0].state != TrialState.COMPLETE:
        causes = {trial.user_attrs.get("failure", "") for trial in trials}
        raise ConfigError(f"No trial finished ({'; '.join(sorted(causes))}).")
    plots = _plot(study, sweep.out_dir)
    best, path = trials[0], os.path.join(sweep.out_dir, "best.yaml")
    fixed = [*sweep.fixed, *flat({"LOG_DEST": "stdout"})]
    cfg = trial_config(sweep.path, fixed, best.params, os.path.join(sweep.out_dir, "best"))
    write_text(path, dump_config(cfg))
    print(
        f"Best: trial {best.number}, error {error_of(best):.2f} % on the images that chose it, so "
        f"this is optimistic. Its weights and the result of the final test are in "
        f"{trial_folder(sweep.out_dir, best.number)}.\n"
        f"Plots: {', '.join(plots)}.\n"
        f"To train with its settings: python run_net.py --mode train --cfg {shlex.quote(path)}",
        flush=True,
    )


def error_of(trial: FrozenTrial) -> float:
    """Return the lowest error of a trial in percent; infinite if it was never tested."""
    return min([*trial.intermediate_values.values(), *(trial.values or ())], default=float("inf"))


def _row(trial: FrozenTrial, space: Space) -> dict[str, Any]:
    error = error_of(trial)
    return {
        "trial": trial.number,
        "error": "" if error == float("inf") else round(error, 2),
        "state": STATES[trial.state],
        "epochs": trial.last_step or "",
        **{key: trial.params.get(key, "") for key in space},
        "failure": trial.user_attrs.get("failure", ""),
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table, without the column of failures if there are none."""
    columns = [c for c in rows[0] if c != "failure" or any(row[c] for row in rows)]
    cells = [columns] + [
        [f"{v:.4g}" if isinstance(v := row[c], float) else str(v) for c in columns] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _plot(study: optuna.Study, out_dir: str) -> list[str]:
    """Draw Optuna's plots and return their paths, without those that the trials are too few for."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker
    from optuna.visualization import matplotlib as plots

    written = []
    num_keys = len(study.best_trial.params)
    for name, draw, width in (
        ("history", plots.plot_optimization_history, 8),
        ("importances", plots.plot_param_importances, 8),
        ("slice", plots.plot_slice, 2 + 3.5 * num_keys),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the plots are declared experimental
            try:
                draw(study, target_name="Error, %")
            except (ValueError, RuntimeError):  # importances need two different results
                continue
            finally:
                figure = pyplot.gcf()
                pyplot.close(figure)
            figure.set_size_inches(width, 4.5)
            for axes in figure.axes:  # labels between the powers of ten overlap
                axes.xaxis.set_minor_formatter(ticker.NullFormatter())
            save = partial(figure.savefig, format="png", dpi=120, bbox_inches="tight")
            path = os.path.join(out_dir, f"{name}.png")
            write_atomically(path, save)
        written.append(path)
    return written
