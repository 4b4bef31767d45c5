"""Error rates and running means; the device is synchronised at log points only."""

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
    "The last checkpoint is not affected. Lower OPTIM.BASE_LR, lengthen "
    "OPTIM.WARMUP_EPOCHS, set OPTIM.CLIP_GRAD_NORM, or set TRAIN.MIXED_PRECISION False."
)


def topk_hits(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> Tensor:
    """Return whether each label is among the k highest scores, for each k.

    Args:
        logits: [N, K].
        labels: [N], class indices.
        ks: Values of k; if one exceeds K, every finite row is a hit.

    Returns:
        [N, len(ks)], bool. A row with non-finite logits is never a hit.
    """
    top = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices
    hits = (top == labels[:, None]) & logits.isfinite().all(dim=1, keepdim=True)
    return torch.stack([hits[:, :k].any(dim=1) for k in ks], dim=1)


@dataclass(frozen=True)
class EvalResult:
    """The result of a test. Errors are in percent; lists have one entry per class."""

    top1_err: float
    top5_err: float
    count: int
    class_counts: list[int]
    class_top1_acc: list[float]  # percent; NaN for a class without samples

    @classmethod
    def from_counts(cls, counts: Tensor) -> EvalResult:
        """Create a result from counts [K, 3]: samples, top-1 hits and top-5 hits of each class."""
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
    """Losses and errors of an epoch; rows stay on the device until `collect` reads them."""

    def __init__(self) -> None:
        self._pending: list[Tensor] = []
        self._window: list[list[float]] = []  # rows since the last log point
        self._totals = [0.0] * len(COLUMNS)  # losses weighted by count

    def add(self, losses: dict[str, Tensor], hits: Tensor) -> None:
        """Add the losses (scalars) and hits [N, 2] of a step, without device synchronisation."""
        terms = torch.stack([losses[t].detach().float() for t in LOSS_TERMS])
        count = torch.full((1,), len(hits), dtype=torch.float32, device=hits.device)
        self._pending.append(torch.cat([terms, (~hits).sum(dim=0).float(), count]))

    def collect(self, *, epoch: int, step: int) -> None:
        """Read the pending rows of all processes in one transfer.

        Means are then over whole batches, and a non-finite loss on one process stops all.

        Args:
            epoch: The current epoch, counted from 0.
            step: Finished steps of the epoch.

        Raises:
            NonFiniteLossError: Names the first step with non-finite losses.
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
        """Return the means since the last call, and start a new window."""
        rows, self._window = self._window, []
        return _means([sum(column) for column in zip(*rows, strict=True)])

    def epoch(self) -> dict[str, float]:
        """Return the means over the epoch so far."""
        return _means(self._totals)

    def end_epoch(self) -> None:
        """Start the means of the next epoch; the window is kept."""
        self._totals = [0.0] * len(COLUMNS)

    def state(self) -> dict[str, Any]:
        """Return the state that an interrupted epoch needs; call `collect` first."""
        assert not self._pending, "call collect() first"
        return {"window": [list(row) for row in self._window], "totals": list(self._totals)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self._window, self._totals = [list(r) for r in state["window"]], list(state["totals"])


def _means(totals: Sequence[float]) -> dict[str, float]:
    """Convert sums over samples to mean losses and errors in percent."""
    sums = dict(zip(COLUMNS, totals, strict=True))
    count = sums["count"]
    means = {term: sums[term] / count for term in LOSS_TERMS}
    return {
        **means,
        "top1_err": 100 * sums["top1_wrong"] / count,
        "top5_err": 100 * sums["top5_wrong"] / count,
    }
