"""LOG_TRACKER: what trackers are told, resumed runs, and trackers that fail."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import lg
from lg import trainer
from lg.errors import ConfigError
from lg.logs.log import RunLog
from lg.logs.tracker import BACKENDS, Tracker, public_config
from tests.run_cases import CONFIGS, TINY

CONFIG = CONFIGS / "digits/vit_digits_base.yaml"


class Service:
    """Stands in for wandb, mlflow and trackio; `calls` holds (function, arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.broken: set[str] = set()
        self.info = types.SimpleNamespace(run_id="run-7")
        self.id = "run-7"

    def __getattr__(self, name: str) -> Any:
        def call(*values: Any, **named: Any) -> Service:
            if name in self.broken:
                raise ConnectionError("no route to host")
            first = dict(enumerate(values))
            self.calls.append((name, {**first, **named}))
            return self

        return call

    def of(self, *names: str) -> list[dict[str, Any]]:
        return [arguments for name, arguments in self.calls if name in names]


@pytest.fixture(params=BACKENDS)
def tracked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Service]:
    service, module = Service(), types.ModuleType(request.param)
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    monkeypatch.setattr(module, "__getattr__", service.__getattr__, raising=False)
    monkeypatch.setitem(sys.modules, request.param, module)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return request.param, service


def train(out_dir: Path, name: str, epochs: int = 1) -> None:
    changes = {"OUT_DIR": out_dir, "LOG_TRACKER": name, "OPTIM.MAX_EPOCH": epochs, "LOG_PERIOD": 2}
    opts = [word for pair in {**TINY, **changes}.items() for word in pair]
    trainer.train(lg.load_config(CONFIG, [*opts, "OPTIM.WARMUP_EPOCHS", 0]))


def test_trackers_get_config_and_scalars_and_resumed_runs_go_on(
    tracked: tuple[str, Service], tmp_path: Path
) -> None:
    name, service = tracked
    out_dir = tmp_path / "digits"
    train(out_dir, name)
    (start,) = service.of("init", "start_run")
    config = start.get("config") or service.of("log_params")[0][0]
    assert config["TRAIN.BATCH_SIZE"] == 30 and config["OUT_DIR"] == str(out_dir)
    assert not any(key.startswith(("LAUNCH.", "HOST", "PORT_RANGE")) for key in config)
    points = service.of("log", "log_metrics")
    # Four steps with a log point every two, the epoch, and tests of the student and its average.
    tags = [next(iter(point[0])).partition("/")[0] for point in points]
    assert tags == ["iteration", "iteration", "epoch", "test", "test_ema"]
    axes = ["iteration"] * 2 + ["epoch"] * 3
    for point, axis, step in zip(points, axes, (2, 4, 1, 1, 1), strict=True):
        assert (point["step"] if name == "mlflow" else point[0][axis]) == step
    assert 0 <= points[3][0]["test/top1_acc"] <= 100
    assert [call for call, _ in service.calls][-1] in ("finish", "end_run")
    if name == "wandb":
        assert start["mode"] == "offline"  # nothing is sent unless the user says so
    service.calls.clear()
    train(out_dir, name, epochs=2)
    (again,) = service.of("init", "start_run")
    key = {"wandb": "id", "mlflow": "run_id", "trackio": "name"}[name]
    first = start["name"] if name == "trackio" else "run-7"
    assert again[key] == first and len(service.of("log", "log_metrics")) == 5


@pytest.mark.parametrize("broken", [{"init", "start_run"}, {"log", "log_metrics"}])
def test_a_tracker_that_fails_is_dropped_with_one_warning(
    tracked: tuple[str, Service],
    tmp_path: Path,
    broken: set[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, service = tracked
    service.broken |= broken
    train(tmp_path, name)
    said = capsys.readouterr().err
    assert said.count(f"LOG_TRACKER {name} failed (no route to host)") == 1
    assert (tmp_path / "model.pyth").exists()


def test_a_missing_package_is_an_error_before_training(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[trackio\]'"):
        train(tmp_path / "run", "trackio")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"LOG_TRACKER is 'wandd'.*Did you mean wandb"):
        train(tmp_path, "wandd")


def test_only_the_main_process_tracks(tmp_path: Path, tracked: tuple[str, Service]) -> None:
    log = RunLog(tmp_path, enabled=False)
    log.tracker = Tracker(tracked[0], tmp_path, {}, log.warn)
    log.open_curves(1)
    log.scalars(1, {"epoch/loss": 1.0})
    log.close()
    assert tracked[1].calls == []


def test_passwords_in_urls_stay_here() -> None:
    url = "https://me:secret@example.org/guide.pyth"
    told = public_config({"DISTILLATION.TEACHER_WEIGHTS": url, "LAUNCH.EMAIL": "me@x"})
    assert told == {"DISTILLATION.TEACHER_WEIGHTS": "https://example.org/guide.pyth"}
