"""The state of a training run: its parts, its progress, and how both are saved and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lg.augment.mixing import Mixing
from lg.checkpoint import CheckpointFolder, random_state, restore_random_state
from lg.config import changed_keys, stored_config
from lg.datasets.cached_loader import CachedTrainLoader, TestLoader
from lg.datasets.loader import TrainLoader
from lg.device import Precision
from lg.distributed import World, barrier, gather_objects
from lg.errors import CheckpointError, ConfigError, NonFiniteLossError
from lg.guidance import GuidanceLoss, GuidanceSchedule, GuidedStudent
from lg.logs.log import RunLog
from lg.logs.reporter import Reporter
from lg.metrics import NON_FINITE_ADVICE, UNKNOWN_ERR, TrainMeter
from lg.models.published import load_published_state_dict, published_state_dict
from lg.optim import LearningRate, WeightAverage

# Keys that `Run.restore` needs.
_NEEDED = (
    *("cfg", "test_err", "ema_err", "model_state", "ema_state", "guidance_state"),
    *("optimizer_state", "scaler_state", "rng_state", "sampler_state", "meter_state", "progress"),
)


# Of messages about checkpoints whose weights can be used.
_HINT = " (TRAIN.WEIGHTS in a new OUT_DIR starts from its weights)"


@dataclass(frozen=True)
class Settings:
    """The numbers of the training loop."""

    max_epoch: int
    warmup_epochs: int  # the weight average copies the weights during these
    test_period: int  # epochs between tests
    early_stop: int  # tests in a row without a lower error that end training; 0: no limit
    log_period: int  # steps between log points
    accum_steps: int  # micro-batches per batch
    clip_norm: float  # largest gradient norm; 0: no limit
    seed: int
    num_classes: int
    config_text: str  # YAML; stored in checkpoints
    class_names: list[str]  # in the order of the labels; stored in checkpoints
    images: dict[str, str]  # "training" | "validation" | "test" -> hash; stored in checkpoints


@dataclass
class Progress:
    """The position of a run and its results so far; errors are in percent."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    test_err: float = UNKNOWN_ERR  # top-1, last test
    ema_err: float = UNKNOWN_ERR  # the same of the weight average
    test_due: bool = False  # whether the last finished epoch still has to be tested
    tested_epoch: int = 0  # of the last test, from 1
    best_err: float = float("inf")  # lowest of both errors over all tests
    best_epoch: int = 0  # its epoch, from 1
    num_stale: int = 0  # tests since then
    test_count: int = 0  # images in the split that is tested during training
    # Result of the final test, see EvalResult.
    final: dict[str, float] = field(default_factory=dict)
    # Lowest errors so far: {"test" | "ema": {"top1_err", "top5_err", "epoch" (of the lowest
    # top1_err, from 1)}}
    best: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Run:
    """All parts of a training run."""

    guided: GuidedStudent
    module: nn.Module  # `guided`, or its compiled or DistributedDataParallel wrapper
    guide: Any  # guide(images, index, view) -> (maps, logits | None)
    loss: GuidanceLoss
    schedule: GuidanceSchedule
    mixing: Mixing
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    average: WeightAverage | None
    precision: Precision
    loader: TrainLoader | CachedTrainLoader
    test_loader: TestLoader
    final_loader: TestLoader | None  # test set, for the end
    device: torch.device
    world: World
    log: RunLog
    report: Reporter
    checkpoints: CheckpointFolder
    settings: Settings
    progress: Progress = field(default_factory=Progress)
    meter: TrainMeter = field(default_factory=TrainMeter)
    signals: list[int] = field(default_factory=list)  # stop signals, in order of arrival

    def close(self) -> None:
        """Stop the processes and threads that read images."""
        for loader in (self.loader, self.test_loader, self.final_loader):
            if loader is not None:
                loader.close()

    @property
    def is_trained(self) -> bool:
        """Whether training is over: all epochs are done, or EARLY_STOP ended it."""
        patience = self.settings.early_stop
        is_stale = 0 < patience <= self.progress.num_stale
        return is_stale or self.progress.epoch >= self.settings.max_epoch

    def save(self, *, is_best: bool = False) -> str:
        """Write a checkpoint; every process calls this, the main process writes.

        Returns:
            The path of the checkpoint; empty on the other processes.

        Raises:
            NonFiniteLossError: The last step broke the weights; nothing is written.
            CheckpointError: The checkpoint cannot be written.
        """
        epoch = self.progress.epoch + (self.progress.step > 0)
        self._check_weights(epoch)
        random_states = gather_objects(random_state())
        path = ""
        if self.world.is_main:
            state = self.state(random_states)
            path = str(self.checkpoints.save(state, epoch=epoch, is_best=is_best))
        barrier()  # no process ends before the checkpoint is written
        return path

    def _check_weights(self, epoch: int) -> None:
        """Check the weights: a loss is checked before its update, so the last update is not."""
        state = {k: v for k, v in self.guided.state_dict().items() if v.is_floating_point()}
        finite = torch.stack([v.isfinite().all() for v in state.values()]).tolist()
        bad = [name for name, good in zip(state, finite, strict=True) if not good]
        if bad:
            raise NonFiniteLossError(
                f"The last step of epoch {epoch} made {len(bad)} weights non-finite, such as "
                f"{bad[0]}. {NON_FINITE_ADVICE}"
            )

    def state(self, random_states: list[Any]) -> dict[str, Any]:
        """Return everything that exact resume needs, as tensors and plain values.

        `epoch` is the last finished epoch, counted from 0. The learning rate depends on the epoch
        alone, and the sampler on the seed and its position, so they have no other state; neither
        have the schedules of guidance, except for the adaptive one.
        """
        progress = asdict(self.progress)
        position = {key: progress.pop(key) for key in ("epoch", "step")}
        errors = {key: progress.pop(key) for key in ("test_err", "ema_err")}
        average = published_state_dict(self.average.module) if self.average is not None else {}
        return {
            "epoch": position["epoch"] - 1,
            **errors,
            "cfg": self.settings.config_text,
            "class_names": self.settings.class_names,
            "images": self.settings.images,
            "model_state": published_state_dict(self.guided.student),
            "ema_state": average,
            "guidance_state": self.guided.heads.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "scaler_state": self.precision.scaler.state_dict(),
            "schedule_state": self.schedule.state(),
            "rng_state": random_states,
            "sampler_state": position,
            "meter_state": self.meter.state(),
            "progress": progress,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state. The optimiser's settings come from the config, not from the state.

        Raises:
            ValueError: The state belongs to another model.
        """
        student = self.guided.student
        load_published_state_dict(student, state["model_state"])
        self.guided.heads.load_state_dict(state["guidance_state"])
        if self.average is not None and state["ema_state"]:
            load_published_state_dict(self.average.module, state["ema_state"])
        elif self.average is not None:  # the average was off so far and starts here
            self.average.set(student)
        self._restore_optimizer(state)
        if state["scaler_state"]:  # empty unless the run used fp16
            self.precision.scaler.load_state_dict(state["scaler_state"])
        if "schedule_state" in state:  # absent in older checkpoints
            self.schedule.load(state["schedule_state"])
        position = {key: state["sampler_state"][key] for key in ("epoch", "step")}
        errors = {key: state[key] for key in ("test_err", "ema_err")}
        tested = position["epoch"] if state["progress"]["best"] else 0  # older files lack it
        progress = {"tested_epoch": tested, **state["progress"], **position, **errors}
        self.progress = Progress(**progress)
        self.meter.load(state["meter_state"])
        if self.world.rank < len(state["rng_state"]):
            restore_random_state(state["rng_state"][self.world.rank])

    def _restore_optimizer(self, state: Mapping[str, Any]) -> None:
        """Restore the optimiser's state and learning rates, and keep its other settings."""
        mine, theirs = (
            stored_config({"cfg": text}).get("OPTIM.OPTIMIZER")
            for text in (self.settings.config_text, state["cfg"])
        )
        if theirs not in (None, mine):
            raise ValueError(
                f"OPTIM.OPTIMIZER is {mine}, but its optimiser state is that of {theirs}{_HINT}"
            )
        saved = state["optimizer_state"]
        settings = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        groups = saved["param_groups"]
        if [g.get("parameter_names") for g in groups] != [s["parameter_names"] for s in settings]:
            raise ValueError("its optimiser state belongs to other parameters")
        # Merged before loading: where the optimiser keeps its state depends on `fused`.
        merged = [{**group, **mine} for group, mine in zip(groups, settings, strict=True)]
        self.optimizer.load_state_dict({**saved, "param_groups": merged})
        # Fused optimisers walk through memory, so their state needs the layout of the weights.
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def resume(run: Run, *, auto: bool, changed: bool) -> None:
    """Load the last checkpoint of the run's folder, if there is one, and open TensorBoard there.

    Args:
        run: A run that has just been built.
        auto: TRAIN.AUTO_RESUME; if False, a folder with checkpoints is an error.
        changed: TRAIN.RESUME_CHANGED; if False, a folder with a run of other settings is an error.

    Raises:
        ConfigError: `auto` or `changed` is False, and the folder holds what it excludes.
        CheckpointError: The checkpoints cannot be used for this run.
    """
    log = run.log
    if not auto:
        check_fresh(run.checkpoints)
    if restore_last(run, log.warn, changed=changed):
        epoch, step = run.progress.epoch, run.progress.step
        where = f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}"
        log.info(f"Resuming after {where} of {run.settings.max_epoch}.")
    log.open_curves(run.progress.epoch * run.loader.steps_per_epoch + run.progress.step + 1)


def check_fresh(checkpoints: CheckpointFolder) -> None:
    """Check that there are no checkpoints, as TRAIN.AUTO_RESUME False requires.

    Raises:
        ConfigError: There are some.
    """
    if checkpoints.files():
        raise ConfigError(
            f"TRAIN.AUTO_RESUME is False, but {checkpoints.folder} has checkpoints of an earlier "
            "run: set OUT_DIR to another folder, remove them, or set TRAIN.AUTO_RESUME True."
        )


def restore_last(run: Run, warn: Callable[[str], None], *, changed: bool) -> bool:
    """Restore the last checkpoint of the run's folder; return whether there is one.

    Args:
        run: A run that has just been built.
        warn: Called with a message for each checkpoint that is skipped and each difference.
        changed: Whether settings may differ from those of the checkpoint.

    Raises:
        CheckpointError: There are checkpoints, and none can be used, or the last does not fit.
        ConfigError: Not `changed`, and the settings are those of another run.
    """
    state = run.checkpoints.load_last(warn)
    if state is None:
        return False
    folder = run.checkpoints.folder
    missing = [key for key in _NEEDED if key not in state]
    if missing:
        raise CheckpointError(_cannot_resume(folder, f"it has no {', '.join(missing)}{_HINT}"))
    try:
        for text in find_differences(run, state, allowed=changed):
            warn(text)
        run.restore(state)
    except ConfigError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(_cannot_resume(folder, str(error))) from None
    return True


def _cannot_resume(folder: Path, reason: str) -> str:
    return (
        f"Cannot resume from the last checkpoint in {folder}: {reason}. Use the settings it was "
        "saved with, or set OUT_DIR to a new folder."
    )


def find_differences(run: Run, state: Mapping[str, Any], *, allowed: bool) -> Iterator[str]:
    """Yield a warning for each difference that changes the training that is resumed.

    Raises:
        ConfigError: Not `allowed`, and the settings are those of another run.
    """
    reported, refused = changed_keys(state["cfg"], run.settings.config_text)
    mine, theirs = run.settings.images, state.get("images", {})  # older checkpoints have none
    refused += [
        f"the {name} images, or their classes, have changed"
        for name in mine
        if theirs.get(name, mine[name]) != mine[name]
    ]
    if refused and not allowed:
        raise ConfigError(
            f"{run.checkpoints.folder} has checkpoints of a run with other settings: "
            f"{'; '.join([*refused, *reported])}. Set OUT_DIR to a new folder, or "
            "TRAIN.RESUME_CHANGED True to continue that run with these settings if model and "
            "optimiser are the same."
        )
    if reported or refused:
        yield f"Resuming with other settings than before: {'; '.join([*reported, *refused])}."
    processes = len(state["rng_state"])
    if processes != run.world.size:
        yield (
            f"Processes changed from {processes} to {run.world.size}: the result is not "
            "bit-identical."
        )
