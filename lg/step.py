"""One training step: gradients of a batch, then the weight update."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lg.datasets.loader import Batch
from lg.metrics import topk_hits
from lg.run import Run


def accumulate_gradients(
    run: Run, batch: Batch, targets: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward and backward of a batch, in micro-batches where the run asks for them.

    Args:
        run: what is trained and guided.
        batch: N images with their indices and views, mixed if they are to be.
        targets: [N, K], distributions over classes.

    Returns:
        The mean losses (scalars) and the hits [N, 2] of the student, top-1 and top-5.
    """
    losses, hits = [], []
    parts = micro_batches(run, batch, targets)
    for number, (part, target) in enumerate(parts, start=1):
        exchange = number == len(parts)
        with contextlib.nullcontext() if exchange else _without_exchange(run.module):
            terms, logits = forward(run, part, target)
            run.precision.scaler.scale(terms["loss"] / len(parts)).backward()
        losses.append({name: term.detach() for name, term in terms.items()})
        hits.append(topk_hits(logits.detach(), target.argmax(dim=1)))
    means = {name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]}
    return means, torch.cat(hits)


def micro_batches(run: Run, batch: Batch, targets: Tensor) -> list[tuple[Batch, Tensor]]:
    """The batch and its targets in as many equal parts as the run asks for."""
    count = run.settings.accum_steps
    columns = zip(*(column.chunk(count) for column in batch), strict=True)
    return list(zip(map(Batch._make, columns), targets.chunk(count), strict=True))


def forward(run: Run, batch: Batch, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Student and guide on the same images; returns the losses and the class logits [N, K]."""
    with run.precision.autocast():
        logits, maps = run.module(batch.images)
        teacher_maps, teacher_logits = run.guide(batch.images, batch.index, batch.view)
    losses = run.loss(logits, maps, targets, teacher_maps, teacher_logits)
    return losses, logits[0] if isinstance(logits, tuple) else logits


def update_weights(run: Run) -> None:
    """One optimiser step on the gradients at hand, clipped if the run asks for it."""
    scaler, limit = run.precision.scaler, run.settings.clip_norm
    if limit > 0:
        scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.guided.parameters(), limit)
    scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad(set_to_none=True)


def _without_exchange(module: nn.Module) -> AbstractContextManager:
    """Processes exchange gradients in the last micro-batch only."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
