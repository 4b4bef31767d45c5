"""The state of a training run, all of it explicit: what it consists of, how far it is, how it is
saved and taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from lg.augment.mixing import Mixing
from lg.checkpoint import CheckpointFolder, random_state, restore_random_state
from lg.datasets.cached_loader import CachedTestLoader, CachedTrainLoader
from lg.datasets.loader import Batch, TrainLoader
from lg.device import Precision
from lg.distributed import World, barrier, gather_objects
from lg.errors import NonFiniteLossError
from lg.guidance import GuidanceLoss, GuidedStudent
from lg.logs.log import RunLog
from lg.logs.reporter import Reporter
from lg.metrics import NON_FINITE_ADVICE, TrainMeter
from lg.models.published import load_published_state_dict, published_name, published_state_dict
from lg.optim import LearningRate, WeightAverage
from lg.progress import Progress

# What `Run.state` writes and `Run.restore` reads.
_NEEDED = (
    *("cfg", "model_state", "ema_state", "guidance_state", "optimizer_state"),
    *("scaler_state", "rng_state", "sampler_state", "meter_state", "progress"),
)


@dataclass(frozen=True)
class Settings:
    """Numbers of the loop."""

    max_epoch: int
    warmup_epochs: int  # in which the weight average copies the weights
    test_period: int  # epochs between tests
    log_period: int  # steps between log points
    accum_steps: int  # micro-batches a batch
    clip_norm: float  # largest gradient norm; 0: any
    seed: int
    num_classes: int
    config_text: str  # YAML, kept in checkpoints


@dataclass
class Run:
    """Everything a training run consists of."""

    guided: GuidedStudent
    module: (
        nn.Module
    )  # what is called and trained: `guided`, or the DistributedDataParallel around it
    guide: Any  # guide(images, index, view) -> (maps, logits | None)
    loss: GuidanceLoss
    mixing: Mixing
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    average: WeightAverage | None
    precision: Precision
    loader: TrainLoader | CachedTrainLoader
    test_loader: DataLoader[Batch] | CachedTestLoader
    device: torch.device
    world: World
    log: RunLog
    report: Reporter
    checkpoints: CheckpointFolder
    settings: Settings
    progress: Progress = field(default_factory=Progress)
    meter: TrainMeter = field(default_factory=TrainMeter)
    signals: list[int] = field(default_factory=list)  # asking to stop, in order of arrival

    def close(self) -> None:
        """Ends the processes and threads that read images."""
        self.loader.close()
        if isinstance(self.test_loader, CachedTestLoader):
            self.test_loader.close()

    def save(self, *, is_best: bool = False) -> str:
        """Writes a checkpoint (the main process; the others hand in their random states).

        Returns:
            Its path; empty on the other processes.

        Raises:
            NonFiniteLossError: the last step has spoilt the weights; nothing is written.
        """
        self._check_weights()
        epoch = self.progress.epoch + (self.progress.step > 0)
        random_states = gather_objects(random_state())
        path = ""
        if self.world.is_main:
            path = str(
                self.checkpoints.save(self.state(random_states), epoch=epoch, is_best=is_best)
            )
        barrier()  # none ends before it is written
        return path

    def _check_weights(self) -> None:
        """Losses are looked at before the update, so the last update has not been judged yet."""
        state = {k: v for k, v in self.guided.state_dict().items() if v.is_floating_point()}
        finite = torch.stack([v.isfinite().all() for v in state.values()]).tolist()
        bad = [name for name, good in zip(state, finite, strict=True) if not good]
        if bad:
            epoch = self.progress.epoch + (self.progress.step > 0)
            raise NonFiniteLossError(
                f"The last step in epoch {epoch} left weights that are not finite, {bad[0]} among "
                f"{len(bad)}. {NON_FINITE_ADVICE}"
            )

    def state(self, random_states: list[Any]) -> dict[str, Any]:
        """All that is needed to go on exactly, as tensors and plain values.

        `epoch` is the last epoch done, counted from 0. The learning rate is a function of the epoch
        and the sampler one of the seed and its position, so neither has more state than
        `sampler_state`.
        """
        progress = self.progress
        return {
            "epoch": progress.epoch - 1,
            "test_err": progress.test_err,
            "ema_err": progress.ema_err,
            "cfg": self.settings.config_text,
            "model_state": published_state_dict(self.guided.student),
            "ema_state": self._published_average(),
            "guidance_state": self.guided.heads.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "scaler_state": self.precision.scaler.state_dict(),
            "rng_state": random_states,
            "sampler_state": {
                "epoch": progress.epoch,
                "step": progress.step,
                "backend": self.loader.backend,
            },
            "meter_state": self.meter.state(),
            "progress": asdict(progress),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up a run where `state` was saved. Settings of the optimiser come from the config,
        not from the file.

        Raises:
            ValueError: the state is of another model, or lacks what training needs.
        """
        missing = [k for k in _NEEDED if k not in state]
        if missing:
            raise ValueError(
                f"it has no {', '.join(missing)}, so training cannot go on from it; give it as "
                f"TRAIN.WEIGHTS instead "
                "and use a new OUT_DIR"
            )
        load_published_state_dict(self.guided.student, state["model_state"])
        self.guided.heads.load_state_dict(state["guidance_state"])
        if self.average is not None and not state["ema_state"]:
            self.average.reset()  # it was off, so it starts here
        elif self.average is not None:
            self.average.load(
                {
                    k: state["ema_state"][published_name(self.guided.student, k)]
                    for k in self.average.state
                }
            )
        settings = [
            {k: v for k, v in g.items() if k not in ("params", "lr")}
            for g in self.optimizer.param_groups
        ]
        names = [g["parameter_names"] for g in settings]
        if [g.get("parameter_names") for g in state["optimizer_state"]["param_groups"]] != names:
            raise ValueError(
                "its optimiser state is of other parameters; use the config it was written with"
            )
        # Settings first: where the optimiser keeps its state depends on them (`fused`).
        saved = state["optimizer_state"]
        groups = [
            {**group, **mine} for group, mine in zip(saved["param_groups"], settings, strict=True)
        ]
        self.optimizer.load_state_dict({**saved, "param_groups": groups})
        if state["scaler_state"]:  # empty unless the run was in fp16
            self.precision.scaler.load_state_dict(state["scaler_state"])
        self.progress = Progress(**state["progress"])
        self.meter.load(state["meter_state"])
        if self.world.rank < len(state["rng_state"]):
            restore_random_state(state["rng_state"][self.world.rank])

    def _published_average(self) -> dict[str, torch.Tensor]:
        if self.average is None:
            return {}
        return {published_name(self.guided.student, k): v for k, v in self.average.state.items()}
