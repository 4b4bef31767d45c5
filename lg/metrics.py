"""Error rates and running means, collected without waiting for the device between log points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lg.distributed import gather_rows
from lg.errors import NonFiniteLossError

LOSS_TERMS = ("loss", "cls", "inter", "logit")
COLUMNS = (*LOSS_TERMS, "top1_wrong", "top5_wrong", "count")
_TERMS = len(LOSS_TERMS)
UNKNOWN_ERR = 100.0  # percent; before the first test

NON_FINITE_ADVICE = (
    "Training stops; the last checkpoint is from before. Lower OPTIM.BASE_LR, lengthen "
    "OPTIM.WARMUP_EPOCHS, set OPTIM.CLIP_GRAD_NORM, or set TRAIN.MIXED_PRECISION False."
)


def topk_hits(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> Tensor:
    """Whether each label is among the k highest scores, for each k.

    Args:
        logits: [N, K].
        labels: [N], class numbers.
        ks: a k above K counts as K, so everything is a hit then.

    Returns:
        [N, len(ks)], bool. A row of logits with NaN is never a hit.
    """
    top = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices
    hits = (top == labels[:, None]) & logits.isfinite().all(dim=1, keepdim=True)
    return torch.stack([hits[:, :k].any(dim=1) for k in ks], dim=1)


@dataclass(frozen=True)
class EvalResult:
    """What a test found. Errors are in percent; lists have one entry a class."""

    top1_err: float
    top5_err: float
    count: int
    class_counts: list[int]
    class_top1_acc: list[float]  # percent; NaN for a class without samples

    @classmethod
    def from_counts(cls, counts: Tensor) -> EvalResult:
        """From [K, 3]: samples, top-1 hits and top-5 hits of each class."""
        rows = counts.tolist()
        count, top1, top5 = (sum(column) for column in zip(*rows, strict=True))
        accuracies = [100 * r[1] / r[0] if r[0] else math.nan for r in rows]
        return cls(
            100 - 100 * top1 / count,
            100 - 100 * top5 / count,
            count,
            [r[0] for r in rows],
            accuracies,
        )


class TrainMeter:
    """Losses and errors of an epoch: rows stay on the device until a log point reads them all at
    once."""

    def __init__(self) -> None:
        self._pending: list[Tensor] = []
        self._window: list[list[float]] = []  # rows since the last log point
        self._totals = [0.0] * len(COLUMNS)  # losses weighted by count

    def add(self, losses: dict[str, Tensor], hits: Tensor) -> None:
        """Keeps one step's losses (scalars) and hits [N, 2]; no device synchronisation."""
        terms = torch.stack([losses[t].detach().float() for t in LOSS_TERMS])
        count = torch.full((1,), len(hits), dtype=torch.float32, device=hits.device)
        self._pending.append(torch.cat([terms, (~hits).sum(dim=0).float(), count]))

    def collect(self, *, epoch: int, step: int) -> None:
        """Reads all pending rows in one transfer, those of all processes, so that means are over
        whole batches and a fault of one process stops all.

        Args:
            epoch: the epoch under way, counted from 0.
            step: steps done in it.

        Raises:
            NonFiniteLossError: naming the first bad step and the terms that are not finite.
        """
        if not self._pending:
            return
        mine = torch.stack(self._pending)
        self._pending.clear()
        steps = torch.stack(gather_rows(mine), dim=1).tolist()  # [steps, processes, columns]
        for number, rows in enumerate(steps, start=step - len(steps) + 1):
            for row in rows:
                self._check(row, f"epoch {epoch + 1}, step {number}")
            weighted = [[v * r[-1] for v in r[:_TERMS]] + r[_TERMS:] for r in rows]
            total = [sum(column) for column in zip(*weighted, strict=True)]
            self._totals = [a + b for a, b in zip(self._totals, total, strict=True)]
            self._window.append(total)

    def _check(self, row: list[float], where: str) -> None:
        terms = zip(LOSS_TERMS, row[:_TERMS], strict=True)
        bad = [f"{term} = {value}" for term, value in terms if not math.isfinite(value)]
        if bad:
            raise NonFiniteLossError(
                f"The loss is not finite in {where}: {', '.join(bad)}. {NON_FINITE_ADVICE}"
            )

    def window(self) -> dict[str, float]:
        """Means over the steps since the last call; clears them."""
        rows, self._window = self._window, []
        return _means([sum(column) for column in zip(*rows, strict=True)])

    def epoch(self) -> dict[str, float]:
        """Means over the epoch so far."""
        return _means(self._totals)

    def end_epoch(self) -> None:
        """Starts the next epoch's means; the window goes on."""
        self._totals = [0.0] * len(COLUMNS)

    def state(self) -> dict[str, Any]:
        """What an interrupted epoch needs to go on; `collect` must have been called."""
        assert not self._pending, "collect() comes first"
        return {"window": [list(row) for row in self._window], "totals": list(self._totals)}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._window, self._totals = [list(r) for r in state["window"]], list(state["totals"])


def _means(totals: Sequence[float]) -> dict[str, float]:
    """Sums over samples to mean losses and errors in percent."""
    sums = dict(zip(COLUMNS, totals, strict=True))
    count = sums["count"]
    means = {term: sums[term] / count for term in LOSS_TERMS}
    return {
        **means,
        "top1_err": 100 * sums["top1_wrong"] / count,
        "top5_err": 100 * sums["top5_wrong"] / count,
    }
