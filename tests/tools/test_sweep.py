"""`--mode sweep`: the space, claims, pruning, resuming, the report."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

import lg
import run_net
from lg import trainer
from lg.errors import ConfigError, DataError, NonFiniteLossError
from lg.run import Progress
from lg.tools.sweep import trials as sweep_trials
from lg.tools.sweep.space import read_space
from tests.run_cases import CONFIGS, TINY, dotted, key_values

CONFIG = str(CONFIGS / "digits/vit_digits_base.yaml")
RATES = "OPTIM.BASE_LR", "log:1e-4:1e-2"
EPOCHS = 6


def opts(out_dir: Path, *varied: str, **changes: Any) -> list[str]:
    values = {**TINY, "OPTIM.MAX_EPOCH": EPOCHS, "TRAIN.VAL_FRACTION": 0.25, "OUT_DIR": out_dir}
    values |= dotted(changes)
    return [*key_values(values), *varied]


def sweep(out_dir: Path, *varied: str, trials: str | None = None, **changes: Any) -> None:
    run_net.dispatch(
        "sweep", CONFIG, opts(out_dir, *varied, **changes), trials=trials, storage=None
    )


def states(out_dir: Path) -> list[tuple[int, str, dict[str, Any]]]:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(out_dir / "sweep.journal"))
    )
    study = optuna.load_study(study_name=str(out_dir), storage=storage)
    return [(t.number, t.state.name, t.params) for t in study.trials]


def read_rows(out_dir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out_dir / "trials.csv").read_text().splitlines()))


class Training:
    """Stands in for `lg.trainer.train`: the error falls with the epochs to 1e4 times the rate."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []  # folder and rate
        self.faults: dict[int, BaseException] = {}  # call, from 0 -> raised in its third epoch
        self.epochs: list[int] = []

    def __call__(self, cfg: Any, *, after_test: Any = None) -> Progress:
        call = len(self.calls)
        self.calls.append((os.path.basename(cfg.OUT_DIR), cfg.OPTIM.BASE_LR))
        self.epochs.append(0)
        progress = Progress()
        for epoch in range(1, cfg.OPTIM.MAX_EPOCH + 1):
            if epoch == 3 and call in self.faults:
                raise self.faults[call]
            error = cfg.OPTIM.BASE_LR * 1e4 * (1 + 1 / epoch) / 2
            progress.epoch, progress.test_err = epoch, error
            progress.best_err = min(progress.best_err, error)
            self.epochs[-1] = epoch
            after_test(progress)
        return progress


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    fake = Training()
    monkeypatch.setattr(trainer, "train", fake)
    return fake


def test_values_become_ranges_choices_and_fixed_overrides(tmp_path: Path) -> None:
    steps = "OPTIM.LR_POLICY", "steps", "OPTIM.STEPS"
    words = opts(
        tmp_path,
        *RATES,
        *(*steps, "[1,2]"),
        *("OPTIM.MAX_EPOCH", "lin:3:9"),
        *("OPTIM.WEIGHT_DECAY", "0, 0.05"),
        *("TRAIN.LABEL_SMOOTHING", "lin:0:0.5"),
    )
    space, fixed, cfg = read_space(CONFIG, words)
    assert space == {
        "OPTIM.MAX_EPOCH": IntDistribution(3, 9),
        "TRAIN.LABEL_SMOOTHING": FloatDistribution(0.0, 0.5),
        "OPTIM.BASE_LR": FloatDistribution(1e-4, 1e-2, log=True),
        "OPTIM.WEIGHT_DECAY": CategoricalDistribution(["0", "0.05"]),
    }
    assert fixed[fixed.index("OPTIM.STEPS") + 1] == "[1,2]" and cfg.OPTIM.STEPS == [1, 2]
    assert cfg.OPTIM.BASE_LR == 1e-4
    space, _, _ = read_space(CONFIG, opts(tmp_path, *steps, "[3,5],[4]"))
    assert space == {"OPTIM.STEPS": CategoricalDistribution(["[3,5]", "[4]"])}


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        ((), "varies nothing: give a key several values"),
        (("OPTIM.LR", "1,2"), r"Did you mean OPTIM\.BASE_LR"),
        (("OPTIM.BASE_LR", "log:1e-2:1e-4"), "LOW below HIGH above 0"),
        (("OPTIM.WEIGHT_DECAY", "log:0:1"), "LOW below HIGH above 0"),
        (("OPTIM.OPTIMIZER", "lin:1:2"), r"OPTIM\.OPTIMIZER is '1'"),
        (("OPTIM.OPTIMIZER", "adamw,sdg"), "OPTIM.OPTIMIZER is 'sdg'"),
        (("OPTIM.WEIGHT_DECAY", "0.1,0.1"), "give each value once"),
        (("LOG_PERIOD", "1,2"), "does not change the result"),
        (("OPTIM.BASE_LR",), "has no value"),
    ],
)
def test_bad_spaces_are_rejected(tmp_path: Path, varied: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path / "out", *varied, trials="3")
    assert not (tmp_path / "out").exists()


def test_the_test_set_may_not_choose(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hold out images with TRAIN\.VAL_FRACTION"):
        sweep(tmp_path, *RATES, trials="3", TRAIN__VAL_FRACTION=0)
    with pytest.raises(ConfigError, match=r"OPTIM\.BASE_LR is a range.*--trials 20"):
        sweep(tmp_path, *RATES)
    with pytest.raises(ConfigError, match="--trials is x"):
        sweep(tmp_path, *RATES, trials="x")


@pytest.mark.parametrize(
    ("visible", "own"), [(None, "1"), ("4,6", "6"), ("5", "5")], ids=["all", "some", "bound"]
)
def test_each_worker_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, own: str
) -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    monkeypatch.setattr(os, "environ", environment)
    sweep_trials._take_own_gpu()
    assert environment == {"CUDA_VISIBLE_DEVICES": own}
    environment.clear()
    sweep_trials._take_own_gpu()
    assert environment == {}  # one process uses what training uses


def test_more_workers_than_gpus_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="NUM_GPUS is 2, but this machine has 1"):
        sweep(tmp_path, *RATES, trials="2", NUM_GPUS=2, DEVICE="auto")


def test_what_all_trials_lack_is_an_error_before_the_first(tmp_path: Path) -> None:
    guided = str(CONFIGS / "digits/vit_digits_ours.yaml")
    words = opts(tmp_path / "out", *RATES, DISTILLATION__TEACHER_WEIGHTS="none.pyth")
    words += ["DISTILLATION.INTER_STUDENT_INDEX", "[0]", "DISTILLATION.INTER_TEACHER_INDEX", "[1]"]
    with pytest.raises(ConfigError, match=r"TEACHER_WEIGHTS is 'none\.pyth', which does not exist"):
        run_net.dispatch("sweep", guided, words, trials="2", storage=None)
    assert not (tmp_path / "out").exists()


def test_a_sweep_reports_its_trials_and_its_best_config(
    tmp_path: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path, *RATES, "OPTIM.WEIGHT_DECAY", "0,0.05", trials="10")
    assert [name for name, _ in training.calls] == [f"trial_{n:03d}" for n in range(10)]
    rows = read_rows(tmp_path)
    finished = [row for row in rows if row["state"] == "finished"]
    errors = [float(row["error"]) for row in finished]
    # A trial worse than the median of five finished ones stops early; no other one does.
    assert len(rows) == 10 and 5 <= len(finished) < 10 and errors == sorted(errors)
    for row in rows:
        stopped = training.epochs[int(row["trial"])]
        assert int(row["epochs"]) == stopped and (stopped == EPOCHS) == (row in finished)
    best = min(rate for _, rate in training.calls)
    cfg = lg.load_config(tmp_path / "best.yaml")
    assert cfg.OPTIM.BASE_LR == best == float(rows[0]["OPTIM.BASE_LR"])
    assert str(tmp_path / "best") == cfg.OUT_DIR and cfg.LOG_DEST == "stdout"
    assert errors[0] == round(best * 1e4 * (1 + 1 / EPOCHS) / 2, 2)
    for name in ("history", "importances", "slice"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "run_net.py --mode train --cfg" in capsys.readouterr().out
    sweep(tmp_path, *RATES, "OPTIM.WEIGHT_DECAY", "0,0.05", trials="10")
    assert len(training.calls) == 10  # nothing is trained again
    sweep(tmp_path, *RATES, "OPTIM.WEIGHT_DECAY", "0,0.05", trials="11")
    assert len(training.calls) == 11


def test_an_interrupted_sweep_goes_on_as_if_it_had_not_been(
    tmp_path: Path, training: Training
) -> None:
    sweep(tmp_path / "straight", *RATES, trials="4")
    straight = [rate for _, rate in training.calls]
    training.calls.clear()
    training.faults[2] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "cut", *RATES, trials="4")
    assert [state for _, state, _ in states(tmp_path / "cut")] == ["COMPLETE"] * 2 + ["RUNNING"]
    sweep(tmp_path / "cut", *RATES, trials="4")
    names = [name for name, _ in training.calls]
    assert names == ["trial_000", "trial_001", "trial_002", "trial_002", "trial_003"]
    rates = [rate for _, rate in training.calls]
    assert rates == [*straight[:3], *straight[2:]]
    found = states(tmp_path / "cut")
    assert [state for _, state, _ in found] == ["COMPLETE"] * 4
    assert [params["OPTIM.BASE_LR"] for _, _, params in found] == straight


def test_a_trial_that_another_process_trains_is_left_alone(
    tmp_path: Path, training: Training
) -> None:
    training.faults[0] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, *RATES, trials="2")
    prepared = sweep_trials.prepare(CONFIG, opts(tmp_path, *RATES), trials="2", storage=None)
    assert prepared is not None
    lock = sweep_trials._try_lock(prepared[1], 0)
    assert lock is not None
    with lock:
        sweep(tmp_path, *RATES, trials="2")
    assert [state for _, state, _ in states(tmp_path)] == ["RUNNING", "COMPLETE"]
    assert not (tmp_path / "best.yaml").exists()
    sweep(tmp_path, *RATES, trials="2")
    assert [state for _, state, _ in states(tmp_path)] == ["COMPLETE", "COMPLETE"]
    assert (tmp_path / "best.yaml").exists()


def test_a_trial_is_locked_until_its_result_is_recorded(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, tell = [], optuna.Study.tell

    def check(study: optuna.Study, trial: optuna.Trial, *args: Any, **options: Any) -> Any:
        lock = sweep_trials._try_lock(prepared[1], trial.number)
        locked.append(lock is None)
        return tell(study, trial, *args, **options)

    prepared = sweep_trials.prepare(CONFIG, opts(tmp_path, *RATES), trials="2", storage=None)
    assert prepared is not None
    monkeypatch.setattr(optuna.Study, "tell", check)
    sweep(tmp_path, *RATES, trials="2")
    assert locked == [True, True]


def test_settings_that_fail_are_a_result_and_other_failures_are_not(
    tmp_path: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    training.faults |= {0: NonFiniteLossError("The loss is nan."), 2: DataError("No such image.")}
    with pytest.raises(SystemExit, match="1"):
        sweep(tmp_path, *RATES, trials="3")
    assert "Error: No such image." in capsys.readouterr().err
    assert [s for _, s, _ in states(tmp_path)] == ["FAIL", "COMPLETE", "RUNNING"]
    sweep(tmp_path, *RATES, trials="3")
    assert [s for _, s, _ in states(tmp_path)] == ["FAIL", "COMPLETE", "COMPLETE"]
    last = read_rows(tmp_path)[-1]
    assert (last["state"], last["failure"]) == ("failed", "The loss is nan")


def test_a_grid_trains_every_combination_once(tmp_path: Path, training: Training) -> None:
    grid = ("OPTIM.BASE_LR", "1e-3,2e-3,3e-3", "RNG_SEED", "1,2")
    training.faults[3] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, *grid)
    sweep(tmp_path, *grid, trials="all")
    found = states(tmp_path)
    assert [state for _, state, _ in found] == ["COMPLETE"] * 6  # a grid is not pruned
    pairs = {(params["OPTIM.BASE_LR"], params["RNG_SEED"]) for _, _, params in found}
    assert pairs == {(rate, seed) for rate in ("1e-3", "2e-3", "3e-3") for seed in "12"}
    assert len(training.calls) == 7


def test_another_sweep_in_the_same_folder_is_refused(tmp_path: Path, training: Training) -> None:
    sweep(tmp_path, *RATES, trials="1")
    for changes, message in (
        ({"TRAIN__BATCH_SIZE": 20}, r"TRAIN\.BATCH_SIZE: 30 -> 20"),
        ({"OPTIM__MAX_EPOCH": 9}, r"OPTIM\.MAX_EPOCH: 6 -> 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep(tmp_path, *RATES, trials="1", **changes)
    with pytest.raises(ConfigError, match=r"the values of OPTIM\.BASE_LR"):
        sweep(tmp_path, "OPTIM.BASE_LR", "log:1e-4:1e-3", trials="1")
    (tmp_path / "sweep.journal").unlink()
    with pytest.raises(ConfigError, match="trials of another sweep"):
        sweep(tmp_path, *RATES, trials="1")


def test_results_in_a_database(tmp_path: Path, training: Training) -> None:
    words, url = opts(tmp_path, *RATES), f"sqlite:///{tmp_path}/sweep.db"
    run_net.dispatch("sweep", CONFIG, words, trials="2", storage=url)
    study = optuna.load_study(study_name=str(tmp_path), storage=url)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert not (tmp_path / "sweep.journal").exists()
    with pytest.raises(ConfigError, match="--storage cannot be used") as caught:
        run_net.dispatch("sweep", CONFIG, words, trials="2", storage="nodb://me:secret@host/x")
    assert "secret" not in str(caught.value)


def test_real_trials_are_trained_tested_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = opts(tmp_path, "OPTIM.BASE_LR", "1e-3,3e-3", OPTIM__MAX_EPOCH=2)
    monkeypatch.setattr(sys, "argv", ["run_net.py", "--mode", "sweep", "--cfg", CONFIG, *words])
    steps, train_step = [], trainer.train_step

    def cut(*args: Any, **options: Any) -> Any:
        if len(steps) == 11:  # in the second epoch of the second trial
            steps.append(0)
            raise OSError(5, "killed")
        steps.append(1)
        return train_step(*args, **options)

    monkeypatch.setattr(trainer, "train_step", cut)
    with pytest.raises(SystemExit):
        run_net.main()
    run_net.main()
    assert sum(steps) == 2 * 2 * 3 + 2  # two steps of the last epoch are repeated
    monkeypatch.setattr(trainer, "train_step", train_step)
    rows = read_rows(tmp_path)
    assert [row["state"] for row in rows] == ["finished"] * 2
    cfg = lg.load_config(tmp_path / "best.yaml", ["OPTIM.MAX_EPOCH", "1", "TEST.PERIOD", "1"])
    assert trainer.train(cfg).epoch == 1


@pytest.mark.slow
def test_two_workers_share_the_trials_of_a_sweep_that_is_killed(tmp_path: Path) -> None:
    words = opts(tmp_path, *RATES, NUM_GPUS=2, OPTIM__MAX_EPOCH=4, LOG_DEST="file")
    command = [sys.executable, "run_net.py", "--mode", "sweep", "--trials", "6", "--cfg", CONFIG]
    process = subprocess.Popen([*command, *words], cwd=CONFIGS.parent)
    while not (tmp_path / "trial_002/checkpoints").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()  # its workers notice, save and end
    process.wait()
    assert not (tmp_path / "best.yaml").exists()
    subprocess.run([*command, *words], cwd=CONFIGS.parent, check=True)
    found = states(tmp_path)
    assert len(found) == 6 and {state for _, state, _ in found} <= {"COMPLETE", "PRUNED"}
    assert len({params["OPTIM.BASE_LR"] for _, _, params in found}) == 6
    assert len(read_rows(tmp_path)) == 6 and (tmp_path / "best.yaml").exists()
