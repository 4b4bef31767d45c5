"""Optional trackers besides TensorBoard: Weights & Biases, MLflow, trackio.

They get the config and the scalars of TensorBoard. Where these go is set by each tracker's
own environment variables; without any, everything stays on this machine. A tracker that fails is
dropped with a warning, because training matters more.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from lg.errors import first_line
from lg.files.atomic import write_text

PROJECT = "lg"
# Addresses and schedulers of the user's machines are private, and so are passwords in URLs.
_PRIVATE = ("LAUNCH.", "HOST", "PORT_RANGE")
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")


class _Backend(Protocol):
    """One run in one tracker."""

    run_id: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _WandB:
    """A run in Weights & Biases; WANDB_MODE is offline unless it is set."""

    def __init__(self, run_id: str | None, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id,
            name=folder.name,
            dir=folder,
            config=dict(config),
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )
        self.run_id = self._run.id
        # Its own step may not go back, and curves of epochs and of iterations count differently.
        for axis, names in (("iteration", "iteration/*"), ("epoch", "*")):
            self._run.define_metric(axis)
            self._run.define_metric(names, step_metric=axis)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, _axis(values): step})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run in MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME set where."""

    def __init__(self, run_id: str | None, folder: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        if run_id is None and "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment(PROJECT)
        run = mlflow.start_run(run_id=run_id, run_name=None if run_id else folder.name)
        self.run_id = run.info.run_id
        if run_id is None:  # parameters of a run cannot change
            mlflow.log_params(config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    """A run in trackio, which stores it on this machine unless TRACKIO_SPACE_ID is set."""

    def __init__(self, run_id: str | None, folder: Path, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        self.run_id = run_id or f"{folder.name}-{os.urandom(4).hex()}"
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.run_id,
            config=dict(config),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log({**values, _axis(values): step})

    def close(self) -> None:
        self._trackio.finish()


BACKENDS: dict[str, Callable[[str | None, Path, Mapping[str, Any]], _Backend]] = {
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


class Tracker:
    """The run of one training in a tracker; a resumed training continues it."""

    def __init__(
        self,
        name: str,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Nothing is imported or sent before `open`.

        Args:
            name: A key of `BACKENDS`.
            folder: The training's folder; its name is the name of the run.
            config: Dotted key -> value.
            warn: Receives the one warning.
        """
        self._name, self._folder, self._warn = name, Path(folder), warn
        self._config = public_config(config)
        self._backend: _Backend | None = None

    def open(self) -> None:
        """Start the run, or continue the one that the folder belongs to."""
        record = self._folder / f".{self._name}_run"
        with self._tolerant():
            run_id = record.read_text().strip() if record.exists() else None
            self._backend = BACKENDS[self._name](run_id, self._folder.absolute(), self._config)
            write_text(record, self._backend.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to several curves.

        Args:
            step: Iterations for tags that begin with iteration/, and epochs for others.
            values: Tag to value.
        """
        if self._backend is not None and values:
            with self._tolerant():
                self._backend.log(step, values)

    def close(self) -> None:
        """End the run."""
        if self._backend is not None:
            with self._tolerant():
                self._backend.close()
            self._backend = None

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the library raises
            self._backend = None
            self._warn(
                f"LOG_TRACKER {self._name} failed ({first_line(error)}) and gets no more of this "
                "run. Training continues."
            )


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the keys of machines and without passwords in URLs."""
    return {
        key: _PASSWORD.sub("", value) if isinstance(value, str) else value
        for key, value in config.items()
        if not key.startswith(_PRIVATE)
    }


def _axis(values: Mapping[str, float]) -> str:
    return "iteration" if next(iter(values)).startswith("iteration/") else "epoch"
