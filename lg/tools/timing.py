"""`--mode time`: seconds of forward, backward, loader and full training step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from statistics import mean, median

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from lg import builders
from lg.datasets.loader import MIX, Batch
from lg.device import synchronize
from lg.logs.log import RunLog
from lg.run import Run
from lg.step import (
    accumulate_gradients,
    forward,
    gradient_sync,
    micro_batches,
    train_step,
    update_weights,
)
from lg.trainer import joined_world

_ROWS = {  # key -> title in the table
    "test_fw_time": "student forward (test)",
    "train_fw_time": "forward with guide and loss",
    "train_bw_time": "backward",
    "train_fw_bw_time": "step on a fixed batch",
    "train_loader_time": "loader alone",
    "train_step_time": "step with loader",
}


def time_steps(cfg: CfgNode) -> dict[str, float]:
    """Measure the parts of the config's training step, print the table and return the seconds."""
    with joined_world(cfg) as world, contextlib.ExitStack() as stack:
        builders.check_training(cfg, trained_guide=False)
        builders.check_world(cfg, world)
        data = builders.fetch_data(cfg, world)
        log = stack.enter_context(contextlib.closing(RunLog(cfg.OUT_DIR, enabled=world.is_main)))
        run = stack.enter_context(contextlib.closing(builders.build_run(cfg, data, world, log)))
        times = measure(run, warmup=cfg.PREC_TIME.WARMUP_ITER, repeats=cfg.PREC_TIME.NUM_ITER)
        report_times(times, run)
        return times


def measure(run: Run, *, warmup: int, repeats: int) -> dict[str, float]:
    """Measure the seconds per batch of each part of training.

    Args:
        run: A run that has not started; its weights change.
        warmup: Repeats that are not counted.
        repeats: Repeats that are counted.

    Returns:
        Medians, except for the loader's mean. `test_fw_time`: the student's forward pass in eval
        mode. `train_fw_time`: student, guide and loss. `train_bw_time`: backward.
        `train_fw_bw_time`: the whole step with the optimiser, on one batch in place.
        `train_loader_time`: the next batch alone, after the prefetched ones have been used up.
        `train_step_time`: the whole step with a new batch each time. `train_loader_overhead`: the
        fraction by which the loader lengthens the step.
    """
    run.loader.start(0, 0)

    def next_batch() -> Batch:
        try:
            return next(run.loader).to(run.device)
        except StopIteration:  # the training is shorter than the measurement
            run.loader.start(0, 0)
            return next(run.loader).to(run.device)

    def timed(work: Callable[[], object]) -> list[float]:
        seconds = []
        for _ in range(warmup + repeats):
            started = _now(run)
            work()
            seconds.append(_now(run) - started)
        return seconds[warmup:]

    def step_in_place() -> None:
        accumulate_gradients(run, batch, targets)
        update_weights(run)

    batch = next_batch()
    random = np.random.default_rng((run.settings.seed, MIX))
    targets = run.mixing(batch.images, batch.labels, random)[1]
    run.module.eval()
    with torch.no_grad(), run.precision.autocast():
        times = {"test_fw_time": median(timed(lambda: run.guided.student(batch.images)))}
    run.module.train()
    passes = [time_passes(run, batch, targets) for _ in range(warmup + repeats)][warmup:]
    times["train_fw_time"], times["train_bw_time"] = map(median, zip(*passes, strict=True))
    times["train_fw_bw_time"] = median(timed(step_in_place))
    for _ in range(run.loader.num_prefetched):
        next_batch()
    times["train_loader_time"] = mean(timed(next_batch))
    steps = timed(lambda: train_step(run, next_batch(), epoch=0, step=0))
    times["train_step_time"] = median(steps)
    times["train_loader_overhead"] = times["train_step_time"] / times["train_fw_bw_time"] - 1
    return times


def time_passes(run: Run, batch: Batch, targets: Tensor) -> tuple[float, float]:
    """Return the seconds of all forward and of all backward passes of a batch.

    Each forward pass is followed by its backward pass, and the gradients are freed: CUDA graphs
    keep both in memory that the next forward pass overwrites.
    """
    forward_seconds = backward_seconds = 0.0
    parts = micro_batches(run, batch, targets)
    for number, part in enumerate(parts, start=1):
        started = _now(run)
        with gradient_sync(run.module, number == len(parts)):
            loss = forward(run, *part)[0]["loss"] / len(parts)
            between = _now(run)
            run.precision.scaler.scale(loss).backward()
        forward_seconds += between - started
        backward_seconds += _now(run) - between
    run.optimizer.zero_grad(set_to_none=True)
    return forward_seconds, backward_seconds


def _now(run: Run) -> float:
    """Return the time in seconds when the device has finished its work."""
    synchronize(run.device)
    return time.perf_counter()


def report_times(times: dict[str, float], run: Run) -> None:
    """Print the table of `measure` and log the stats `iter_times` and `epoch_times`."""
    log, size, steps = run.log, run.report.batch_size, run.loader.steps_per_epoch
    log.info(
        f"Batches of {size} on {run.device} in {run.precision}, median seconds (loader: mean):"
    )
    for key, title in _ROWS.items():
        log.info(f"  {title:<28} {times[key]:9.4f} s  {size / times[key]:10,.0f} images/s")
    log.info(f"  {'loader overhead':<28} {100 * times['train_loader_overhead']:9.1f} %")
    log.info(f"  {'training epoch':<28} {steps * times['train_step_time']:9.1f} s  ({steps} steps)")
    log.stats("iter_times", times)
    keys = ("train_fw_bw_time", "train_step_time")
    log.stats("epoch_times", {key: steps * times[key] for key in keys})
