"""One training step: mixing, gradients of a batch, weight update."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lg.datasets.loader import MIX, Batch
from lg.metrics import topk_hits
from lg.run import Run


def train_step(
    run: Run, batch: Batch, *, epoch: int, step: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Take one training step on an augmented batch.

    Args:
        run: The run to train.
        batch: N images with labels, indices and views, on the run's device.
        epoch: Counted from 0.
        step: Counted from 0 within the epoch.

    Returns:
        The mean losses (scalars) and the student's hits [N, 2], top-1 and top-5.
    """
    images, targets = mix(run, batch, epoch=epoch, step=step)
    # Forward and backward; student and guide see the same images.
    losses, hits = accumulate_gradients(run, batch._replace(images=images), targets)
    # Clip the gradients and update the weights.
    update_weights(run)
    return losses, hits


def mix(run: Run, batch: Batch, *, epoch: int, step: int) -> tuple[Tensor, Tensor]:
    """Return the mixed images [N, C, S, S] and targets [N, K] of a batch.

    Seed and position determine the draws, the same in every process.
    """
    random = np.random.default_rng((run.settings.seed, MIX, epoch, step))
    return run.mixing(batch.images, batch.labels, random)


def accumulate_gradients(
    run: Run, batch: Batch, targets: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Run forward and backward on a batch, split into ACCUM_STEPS micro-batches.

    Args:
        run: The run to train.
        batch: N mixed images with their indices and views.
        targets: [N, K], distributions over classes.

    Returns:
        As `train_step`.
    """
    losses, hits = [], []
    parts = micro_batches(run, batch, targets)
    for number, (part, target) in enumerate(parts, start=1):
        is_last = number == len(parts)
        with gradient_sync(run.module, is_last):
            terms, logits = forward(run, part, target)
            run.precision.scaler.scale(terms["loss"] / len(parts)).backward()
        losses.append({name: term.detach() for name, term in terms.items()})
        hits.append(topk_hits(logits.detach(), target.argmax(dim=1)))
    means = {name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]}
    return means, torch.cat(hits)


def micro_batches(run: Run, batch: Batch, targets: Tensor) -> list[tuple[Batch, Tensor]]:
    """Split a batch and its targets into ACCUM_STEPS equal parts."""
    count = run.settings.accum_steps
    columns = zip(*(column.chunk(count) for column in batch), strict=True)
    return list(zip(map(Batch._make, columns), targets.chunk(count), strict=True))


def forward(run: Run, batch: Batch, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Run student and guide on the same images; return the losses and the logits [N, K].

    Where the schedule of guidance is at 0, the guide does not run.
    """
    factor = run.schedule.factor(run.progress.epoch)
    with run.precision.autocast():
        logits, maps = run.module(batch.images, imitate=factor > 0)
        guidance = run.guide(batch.images, batch.index, batch.view) if factor > 0 else ()
    losses = run.loss(logits, maps, targets, *guidance, factor=factor)
    return losses, logits[0] if isinstance(logits, tuple) else logits


def update_weights(run: Run) -> None:
    """Take one optimiser step; clip the gradients first where OPTIM.CLIP_GRAD_NORM is set."""
    scaler, limit = run.precision.scaler, run.settings.clip_norm
    if run.schedule.factor(run.progress.epoch) == 0:
        run.guided.drop_idle_gradients()
    if limit > 0:
        scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.guided.parameters(), limit)
    scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad(set_to_none=True)


def gradient_sync(module: nn.Module, is_last: bool) -> AbstractContextManager:
    """Average gradients over processes in the last micro-batch only (DDP's `no_sync` in others)."""
    if not is_last and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
