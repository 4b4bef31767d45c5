"""The first steps of a training, and the time, memory and disk space that the whole will take."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from yacs.config import CfgNode

from lg.checkpoint import CheckpointFolder, file_size, random_state
from lg.device import (
    MAX_CORE_WAIT,
    core_wait_advice,
    core_wait_seconds,
    free_memory,
    peak_memory_mb,
    synchronize,
    usable_cores,
)
from lg.files.lock import existing_folder
from lg.logs.log import format_time
from lg.metrics import NON_FINITE_ADVICE
from lg.run import Run
from lg.step import train_step
from lg.tools.doctor.findings import COST, FACT, NOTE, OUTPUT, PROBLEM, Finding, format_size

_STEPS = 3  # training steps; the first one warms up
# Another number of threads is recommended if a step takes at most this fraction of the time.
_CLEARLY = 0.7


@dataclass(frozen=True)
class Trial:
    """Measurements of the first steps.

    Attributes:
        losses: Of the steps.
        step_seconds: Of a step and its batch, without the first.
        test_seconds: Of a test batch, without the first.
        peak_mb: Peak memory in MB (1024^2 bytes): of torch on a GPU, of this process elsewhere.
        total_mb: Available memory in MB.
        checkpoint_bytes: Size of a checkpoint.
        core_wait: Share of the training steps spent waiting for a core of the CPU.
        thread_seconds: Number of threads -> seconds of the fastest step with them; empty on a GPU.
    """

    losses: list[float]
    step_seconds: float
    test_seconds: float
    peak_mb: int
    total_mb: int
    checkpoint_bytes: int
    core_wait: float = 0.0
    thread_seconds: Mapping[int, float] = field(default_factory=dict)


def try_steps(run: Run) -> Trial:
    """Take training steps and test some batches; the run's weights change."""
    on_gpu = run.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
    started, waited = time.perf_counter(), core_wait_seconds()
    losses, seconds = _train(run)
    core_wait = (core_wait_seconds() - waited) / (time.perf_counter() - started)
    threads = {} if on_gpu else _try_threads(run, min(seconds))
    test_seconds = _test(run)
    peak = peak_memory_mb(run.device)
    if on_gpu:
        total = torch.cuda.mem_get_info(run.device)[1] // 2**20
    else:
        total = free_memory(torch.device("cpu")) // 2**20 + peak
    checkpoint_bytes = file_size(run.state([random_state()]))
    return Trial(
        losses=losses,
        step_seconds=float(np.mean(seconds)),
        test_seconds=test_seconds,
        peak_mb=peak,
        total_mb=total,
        checkpoint_bytes=checkpoint_bytes,
        core_wait=core_wait,
        thread_seconds=threads,
    )


def estimate_cost(
    cfg: CfgNode, trial: Trial, run: Run, *, num_train: int, num_test: int
) -> list[Finding]:
    """Report time and memory of the whole training, and losses that are not finite.

    Args:
        cfg: The config of the training.
        trial: Its first steps.
        run: The run that took them, for one process.
        num_train: Training images.
        num_test: Images that are tested every TEST.PERIOD epochs.
    """
    num_processes, num_epochs = cfg.NUM_GPUS, cfg.OPTIM.MAX_EPOCH
    num_steps = num_epochs * (num_train // cfg.TRAIN.BATCH_SIZE)
    num_tests = math.ceil(num_epochs / cfg.TEST.PERIOD) * (1 if run.average is None else 2)
    training = num_steps * trial.step_seconds
    testing = num_tests * math.ceil(num_test / cfg.TEST.BATCH_SIZE) * trial.test_seconds
    one_of = f" Measured in one of {num_processes} processes, without the exchange of gradients."
    lines = [
        f"about {trial.step_seconds:.2g} s per step of {cfg.TRAIN.BATCH_SIZE // num_processes:,} "
        f"images: {format_time(training)} for the {num_steps:,} steps of {num_epochs:,} epochs, "
        f"{format_time(testing)} for the tests, {format_time(training + testing)} in total."
        f"{one_of if num_processes > 1 else ''}",
        f"peak memory: {trial.peak_mb:,} of {trial.total_mb:,} MB ({run.device}).",
        f"DATA_LOADER.BACKEND {cfg.DATA_LOADER.BACKEND}: {run.loader}.",
    ]
    found = [Finding(FACT, COST, line) for line in lines]
    if run.device.type == "cpu" and trial.core_wait > MAX_CORE_WAIT:
        found.append(Finding(NOTE, COST, _describe_contention(trial.core_wait)))
    if (threads := _better_threads(trial.thread_seconds)) is not None:
        found.append(Finding(NOTE, COST, threads))
    if not np.isfinite(trial.losses).all():
        losses = ", ".join(f"{loss:.3g}" for loss in trial.losses)
        text = f"the losses of the first steps are {losses}. {NON_FINITE_ADVICE}"
        found.append(Finding(PROBLEM, COST, text))
    return found


def _describe_contention(core_wait: float) -> str:
    cores = usable_cores()
    return (
        f"the steps waited {core_wait:.0%} of the time for a core, so they ran at about "
        f"{1 - core_wait:.0%} of their speed ({cores} core{'s' * (cores > 1)} may be used; the "
        f"load average is {os.getloadavg()[0]:.1f}). {core_wait_advice()}"
    )


def _better_threads(seconds: Mapping[int, float]) -> str | None:
    """Name a number of threads that is clearly faster than the first one, which was set."""
    if not seconds:
        return None
    current, best = next(iter(seconds)), min(seconds, key=lambda count: seconds[count])
    if seconds[best] > _CLEARLY * seconds[current]:
        return None
    return (
        f"a step takes {seconds[best]:.2g} s with {best} thread{'s' * (best > 1)}, and "
        f"{seconds[current]:.2g} s with {current} as now: set the environment variable "
        f"OMP_NUM_THREADS={best}."
    )


def estimate_disk(cfg: CfgNode, checkpoint_bytes: int, checkpoints: CheckpointFolder) -> Finding:
    """Report whether the checkpoints fit on the disk, in place of those that exist already."""
    place = existing_folder(Path(cfg.OUT_DIR))
    free = shutil.disk_usage(place).free
    files = [*checkpoints.files(), *filter(Path.is_file, [checkpoints.best])]
    count = cfg.TRAIN.KEEP_CHECKPOINTS + 2
    needed = count * checkpoint_bytes
    text = (
        f"a checkpoint takes {format_size(checkpoint_bytes)}, {count} of them (kept, best and "
        f"being written) {format_size(needed)}; {format_size(free)} are free in {place}"
    )
    if needed - sum(file.stat().st_size for file in files) <= free:
        return Finding(FACT, OUTPUT, f"{text}.")
    fix = "free some space, lower TRAIN.KEEP_CHECKPOINTS, or set OUT_DIR to another disk."
    return Finding(PROBLEM, OUTPUT, f"{text}: {fix}")


def _try_threads(run: Run, current_seconds: float) -> dict[int, float]:
    """Return the seconds of the fastest step with some numbers of threads, the current one first.

    Compiled code keeps the number of threads it was compiled for, so nothing else is tried then.
    """
    current = torch.get_num_threads()
    seconds = {current: current_seconds}
    if run.module is not run.guided:
        return seconds
    try:
        for count in {1, usable_cores()} - {current}:
            torch.set_num_threads(count)
            seconds[count] = min(_train(run)[1])
    finally:
        torch.set_num_threads(current)
    return seconds


def _train(run: Run) -> tuple[list[float], list[float]]:
    """Return the losses of the first steps, and the seconds of each without the first."""
    losses, seconds = [], []
    run.module.train()
    run.learning_rate.apply(run.optimizer, 0)
    run.loader.start(0, 0)
    for step in range(_STEPS):
        synchronize(run.device)
        started = time.perf_counter()
        try:
            batch = next(run.loader).to(run.device)
        except StopIteration:  # the whole training has fewer steps
            break
        terms, _ = train_step(run, batch, epoch=0, step=step)
        losses.append(float(terms["loss"]))
        synchronize(run.device)
        seconds.append(time.perf_counter() - started)
    return losses, seconds[1:] or seconds


@torch.no_grad()
def _test(run: Run) -> float:
    """Return the seconds of the second test batch, or of the first if there is no other."""
    seconds = [0.0]
    run.guided.student.eval()
    batches = iter(run.test_loader)
    for _ in range(_STEPS - 1):
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        with run.precision.autocast():
            run.guided.student(batch.to(run.device).images)
        synchronize(run.device)
        seconds.append(time.perf_counter() - started)
    return seconds[-1]
