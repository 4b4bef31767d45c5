"""The trials of a sweep: how they are claimed, trained, pruned, and resumed after a kill.

Every worker process asks the study for the next trial, and holds a lock while it trains. A trial
without a result whose lock is free belonged to a process that died: the next worker resumes it from
its checkpoint. So any number of workers may join and leave, on machines that share OUT_DIR.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import torch
from filelock import FileLock, Timeout
from optuna.distributions import CategoricalDistribution, distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from yacs.config import CfgNode

from lg import trainer
from lg.builders import check_training
from lg.builders.splits import check_validation, has_val_split
from lg.config import changed_keys, dump_config
from lg.errors import ConfigError, NonFiniteLossError, first_line, is_out_of_memory
from lg.files.lock import check_writable
from lg.run import Progress
from lg.tools.sweep.report import report
from lg.tools.sweep.space import (
    Space,
    Sweep,
    read_space,
    suggest,
    trial_config,
    trial_folder,
)

JOURNAL = "sweep.journal"
_STARTUP = 5  # finished trials before any is pruned


def prepare(
    path: str, opts: Sequence[str], *, trials: str | None, storage: str | None
) -> tuple[CfgNode, Sweep] | None:
    """Check a sweep and create or open its study; report it if it is finished.

    Args:
        path: The config.
        opts: KEY VALUE KEY VALUE ..., see `lg.tools.sweep.space`.
        trials: Their number; "all" or None: all combinations of the choices.
        storage: URL of a database for the results; None: a file in OUT_DIR.

    Returns:
        The config that says how many processes run where, and the sweep; None if it is finished.

    Raises:
        ConfigError: The sweep cannot run.
    """
    space, fixed, cfg = read_space(path, opts)
    _check_start(cfg)
    total, is_grid = _count(space, trials)
    sweep = Sweep(
        path=path,
        fixed=fixed,
        space=space,
        total=total,
        is_grid=is_grid,
        out_dir=cfg.OUT_DIR,
        storage=storage,
        seed=cfg.RNG_SEED,
        warmup=max(cfg.OPTIM.WARMUP_EPOCHS, cfg.OPTIM.MAX_EPOCH // 4),
    )
    check_writable(sweep.out_dir)
    os.makedirs(sweep.out_dir, exist_ok=True)
    with _claims(sweep):
        study = open_study(sweep)
        _check_same(study, sweep, cfg)
        if is_grid:
            _enqueue_grid(study, space)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    finished = sum(state.is_finished() for state in states)
    print(f"Sweep in {sweep.out_dir}: {finished} of {total} trials finished.", flush=True)
    if finished >= total:
        report(study, sweep)
        return None
    return cfg, sweep


def _check_start(cfg: CfgNode) -> None:
    """Check that a sweep can run here, and that other images than the test set choose."""
    if "RANK" in os.environ:
        raise ConfigError(
            "--mode sweep trains one trial per process and starts NUM_GPUS of them itself: run it "
            "without torchrun."
        )
    check_training(cfg)  # what is missing for one trial is missing for all
    check_validation(cfg)
    if not has_val_split(cfg):
        raise ConfigError(
            "A sweep chooses settings by their error, and TRAIN.VAL_FRACTION is 0, so the test set "
            "would choose: hold out images with TRAIN.VAL_FRACTION, such as 0.2 (or use an "
            "image_folder with val/ and test/)."
        )
    gpus = torch.cuda.device_count() if cfg.DEVICE in ("auto", "cuda") else 0
    if cfg.LAUNCH.MODE == "local" and 0 < gpus < cfg.NUM_GPUS:
        raise ConfigError(
            f"NUM_GPUS is {cfg.NUM_GPUS}, but this machine has {gpus}: a sweep trains one trial "
            "per GPU, so lower it."
        )


def work(cfg: CfgNode, *, sweep: Sweep) -> None:
    """Train trials until there are no more; the worker that finishes the last one reports.

    Args:
        cfg: The config of the sweep.
        sweep: The sweep.
    """
    _take_own_gpu()
    study = open_study(sweep)
    outcome: dict[str, Any] = {}
    with contextlib.ExitStack() as held:  # the lock of the trial, until its result is recorded
        while True:
            with _claims(sweep):
                if outcome:
                    study.tell(**outcome)
                held.close()
                claim = _claim(study, sweep)
                is_over = bool(outcome) and not study.get_trials(
                    deepcopy=False, states=(TrialState.RUNNING,)
                )
            if claim is None:
                break
            trial, lock = claim
            held.enter_context(lock)
            outcome = _run(trial, sweep)
    if is_over:
        report(study, sweep)


def open_study(sweep: Sweep) -> optuna.Study:
    """Open the study of a sweep, or create it.

    Raises:
        ConfigError: The database cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = (
        optuna.pruners.NopPruner()
        if sweep.is_grid
        else optuna.pruners.MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=sweep.warmup)
    )
    try:
        storage: Any = sweep.storage or JournalStorage(
            JournalFileBackend(os.path.join(sweep.out_dir, JOURNAL))
        )
        return optuna.create_study(
            study_name=sweep.out_dir, storage=storage, pruner=pruner, load_if_exists=True
        )
    except Exception as error:  # of whichever database library reads the URL
        if sweep.storage is None:
            raise
        # Without the URL, which may have a password in it.
        raise ConfigError(
            f"--storage cannot be used ({type(error).__name__}): give the URL of a database, such "
            "as sqlite:///sweep.db, and install its driver."
        ) from None


def _count(space: Space, trials: str | None) -> tuple[int, bool]:
    """Return the number of trials and whether they are a grid."""
    choices = [a.choices for a in space.values() if isinstance(a, CategoricalDistribution)]
    size = math.prod(map(len, choices)) if len(choices) == len(space) else None
    if trials in (None, "all"):
        if size is None:
            ranges = [k for k, a in space.items() if not isinstance(a, CategoricalDistribution)]
            raise ConfigError(
                f"{ranges[0]} is a range, which has infinitely many values: give the number of "
                "trials, such as --trials 20, or list values as A,B,C."
            )
        return size, True
    if not str(trials).isdecimal() or int(str(trials)) < 1:
        raise ConfigError(f"--trials is {trials}: give a number of at least 1, or all.")
    number = int(str(trials))
    return (size, True) if size is not None and number >= size else (number, False)


def _check_same(study: optuna.Study, sweep: Sweep, cfg: CfgNode) -> None:
    """Check that the study belongs to this sweep; record it in a new study.

    Raises:
        ConfigError: It belongs to another one.
    """
    way_out = "Set OUT_DIR to a new folder, or repeat the original command."
    space = {key: json.loads(distribution_to_json(a)) for key, a in sweep.space.items()}
    saved = study.user_attrs
    if "space" not in saved:
        if os.path.exists(trial_folder(sweep.out_dir, 0)):
            raise ConfigError(f"{sweep.out_dir} has trials of another sweep. {way_out}")
        study.set_user_attr("config", dump_config(cfg))
        study.set_user_attr("space", space)
        return
    reported, refused = changed_keys(saved["config"], dump_config(cfg))
    refused += [line for line in reported if line.startswith(("OPTIM.", "TRAIN.EARLY_STOP"))]
    for key in dict.fromkeys([*space, *saved["space"]]):
        if space.get(key) != saved["space"].get(key):
            refused.append(f"the values of {key}")
    if refused:
        raise ConfigError(
            f"{sweep.out_dir} has a sweep with other settings: {'; '.join(refused)}. {way_out}"
        )


def _enqueue_grid(study: optuna.Study, space: Space) -> None:
    choices = [a.choices for a in space.values() if isinstance(a, CategoricalDistribution)]
    for values in itertools.product(*choices):
        study.enqueue_trial(dict(zip(space, values, strict=True)), skip_if_exists=True)


def _claims(sweep: Sweep) -> FileLock:
    """Return the lock under which trials are claimed and finished."""
    return FileLock(os.path.join(sweep.out_dir, ".claim"))


def _claim(
    study: optuna.Study, sweep: Sweep
) -> tuple[optuna.Trial, contextlib.AbstractContextManager[Any]] | None:
    """Return a trial that nobody trains, and its lock; None if there are none left to start."""
    trials = study.get_trials(deepcopy=False)
    # A sampler of its own for each trial, so that a resumed sweep draws what it would have drawn.
    for frozen in trials:
        if frozen.state == TrialState.RUNNING:
            lock = _try_lock(sweep, frozen.number)
            if lock is not None:
                study.sampler = _sampler(sweep, frozen.number)
                return optuna.Trial(study, frozen._trial_id), lock
    number = sum(trial.state != TrialState.WAITING for trial in trials)
    if number >= sweep.total:
        return None
    study.sampler = _sampler(sweep, number)
    trial = study.ask()
    suggest(trial, sweep.space)
    lock = _try_lock(sweep, trial.number)
    assert lock is not None, f"trial {trial.number} is new, but locked"
    return trial, lock


def _sampler(sweep: Sweep, number: int) -> optuna.samplers.BaseSampler:
    seed = np.random.SeedSequence((sweep.seed, number)).generate_state(1)[0]
    return optuna.samplers.TPESampler(seed=int(seed))


def _try_lock(sweep: Sweep, number: int) -> contextlib.AbstractContextManager[Any] | None:
    """Lock a trial until the end of a `with` block; None if another process has locked it."""
    folder = trial_folder(sweep.out_dir, number)
    os.makedirs(folder, exist_ok=True)
    try:
        return FileLock(os.path.join(folder, ".trial")).acquire(timeout=0)
    except Timeout:
        return None


def _run(trial: optuna.Trial, sweep: Sweep) -> dict[str, Any]:
    """Train a trial, or what is left of it, and return how to record its result.

    A failure that its settings cause is a result. Any other one ends the worker, and the trial is
    resumed when the sweep is started again.
    """
    values = suggest(trial, sweep.space)
    name = f"Trial {trial.number} ({', '.join(f'{k} {_short(v)}' for k, v in values.items())})"
    folder = trial_folder(sweep.out_dir, trial.number)
    print(f"{name}: {folder}", flush=True)
    try:
        cfg = trial_config(sweep.path, sweep.fixed, values, folder)
        progress = trainer.train(cfg, after_test=_observer(trial, cfg.OPTIM.MAX_EPOCH))
    except optuna.TrialPruned:
        print(f"{name}: pruned, worse than the median of the trials at this epoch.", flush=True)
        return {"trial": trial, "state": TrialState.PRUNED}
    except Exception as error:
        if not isinstance(error, (ConfigError, NonFiniteLossError)) and not is_out_of_memory(error):
            raise
        cause = first_line(error)
    else:
        print(f"{name}: error {progress.best_err:.2f} %.", flush=True)
        return {"trial": trial, "values": progress.best_err}
    trial.set_user_attr("failure", cause)
    print(f"{name}: failed ({cause}).", flush=True)
    return {"trial": trial, "state": TrialState.FAIL}


def _observer(trial: optuna.Trial, max_epoch: int) -> Callable[[Progress], None]:
    """Return a function that reports each test to the study, and raises to prune the trial."""
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    known = set(frozen.intermediate_values)

    def after_test(progress: Progress) -> None:
        if progress.epoch not in known:  # a resumed trial repeats a test at most
            trial.report(min(progress.test_err, progress.ema_err), step=progress.epoch)
        if progress.epoch < max_epoch and trial.should_prune():
            raise optuna.TrialPruned

    return after_test


def _take_own_gpu() -> None:
    """Leave the group of the processes that started together: each trains trials of its own."""
    if "RANK" not in os.environ:
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    place = int(os.environ.pop("LOCAL_RANK", 0))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place)
    elif "," in visible:  # a single one is this process's own, as a cluster may bind it
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
