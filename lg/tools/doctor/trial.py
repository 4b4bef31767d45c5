"""The first steps of a training, and what they say of the whole: time, memory, room on disk."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from lg.checkpoint import random_state, size_of
from lg.datasets.cache import free_memory
from lg.device import peak_memory_mb, synchronize
from lg.logs.log import format_time
from lg.metrics import NON_FINITE_ADVICE
from lg.run import Run
from lg.step import train_step
from lg.tools.doctor.findings import COST, FACT, OUTPUT, PROBLEM, Finding

_STEPS = 3  # training steps that are taken; the first one warms up


@dataclass(frozen=True)
class Trial:
    """What the first steps took.

    Attributes:
        losses: Of the steps.
        step_seconds: Of one step with its batch, after the first.
        test_seconds: Of one batch of a test, after the first.
        peak_mb: Peak memory, MiB: on a GPU of torch, else of this process.
        total_mb: Memory that there is for that, MiB.
        checkpoint_bytes: Size of a checkpoint.
    """

    losses: list[float]
    step_seconds: float
    test_seconds: float
    peak_mb: int
    total_mb: int
    checkpoint_bytes: int


def try_steps(run: Run) -> Trial:
    """Takes training steps and tests some batches; the run's weights change."""
    on_gpu = run.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
    losses, step_seconds = _train(run)
    test_seconds = _test(run)
    peak = peak_memory_mb(run.device)
    if on_gpu:
        total = torch.cuda.mem_get_info(run.device)[1] // 2**20
    else:
        total = free_memory(torch.device("cpu")) // 2**20 + peak
    return Trial(
        losses, step_seconds, test_seconds, peak, total, size_of(run.state([random_state()]))
    )


def cost(
    trial: Trial,
    *,
    device: str,
    batch_size: int,
    num_processes: int,
    steps_per_epoch: int,
    max_epoch: int,
    test_period: int,
    test_batches: int,
    with_average: bool,
    images: str,
    kept_bytes: int,
) -> list[Finding]:
    """Time and memory of the whole training, and whether its loss is a number.

    Args:
        trial: Its first steps.
        device: That they ran on.
        batch_size: Images a step in each process.
        num_processes: That share the work.
        steps_per_epoch: Optimiser steps.
        max_epoch: Epochs.
        test_period: Epochs between tests.
        test_batches: Batches of a test.
        with_average: Whether the weight average is tested too.
        images: Where images come from, in words.
        kept_bytes: What the decoded images take, 0 if they are not kept.
    """
    num_steps = max_epoch * steps_per_epoch
    num_tests = math.ceil(max_epoch / test_period) * (2 if with_average else 1)
    training, testing = (
        num_steps * trial.step_seconds,
        num_tests * test_batches * trial.test_seconds,
    )
    kept = f" They take about {_size(kept_bytes)}." if kept_bytes else ""
    others = f"one of {num_processes} processes, which exchange gradients on top of it"
    shared = f" Measured in {others}." if num_processes > 1 else ""
    lines = [
        f"about {trial.step_seconds:.2g} s a step of {batch_size:,} images: "
        f"{format_time(training)} for the {num_steps:,} steps of {max_epoch:,} epochs, "
        f"{format_time(testing)} for the tests, {format_time(training + testing)} in all."
        f"{shared}",
        f"{trial.peak_mb:,} of {trial.total_mb:,} MiB of memory taken at most ({device}).",
        f"{images}.{kept}",
    ]
    found = [Finding(FACT, COST, line) for line in lines]
    if not np.isfinite(trial.losses).all():
        losses = ", ".join(f"{loss:.3g}" for loss in trial.losses)
        text = f"the losses of the first steps are {losses}. {NON_FINITE_ADVICE}"
        found.append(Finding(PROBLEM, COST, text))
    return found


def disk(*, checkpoint_bytes: int, count: int, there: int, free: int, place: str) -> Finding:
    """Whether the checkpoints fit.

    Args:
        checkpoint_bytes: Of one.
        count: Files that are there at once, the one that is being written among them.
        there: Bytes of those that are there already.
        free: Bytes.
        place: Where.
    """
    needed = count * checkpoint_bytes
    text = (
        f"a checkpoint takes {_size(checkpoint_bytes)}, {count} of them (kept, best and being "
        f"written) {_size(needed)}; {_size(free)} is free in {place}"
    )
    if needed - there <= free:
        return Finding(FACT, OUTPUT, f"{text}.")
    ways = "make room, lower TRAIN.KEEP_CHECKPOINTS, or set OUT_DIR to another disk."
    return Finding(PROBLEM, OUTPUT, f"{text}: {ways}")


def _train(run: Run) -> tuple[list[float], float]:
    """Losses of the first steps, and the seconds of one after the first."""
    losses, seconds = [], []
    run.module.train()
    run.learning_rate.apply(run.optimizer, 0)
    run.loader.start(0, 0)
    for step in range(_STEPS):
        synchronize(run.device)
        started = time.perf_counter()
        try:
            batch = next(run.loader).to(run.device)
        except StopIteration:  # the whole training is shorter
            break
        terms, _ = train_step(run, batch, epoch=0, step=step)
        losses.append(float(terms["loss"]))
        synchronize(run.device)
        seconds.append(time.perf_counter() - started)
    return losses, float(np.mean(seconds[1:] or seconds))


@torch.no_grad()
def _test(run: Run) -> float:
    """Seconds of one batch of a test, after the first."""
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


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
