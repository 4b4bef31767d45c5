"""Error rates and running means; the device is synchronised at log points only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lg.distributed import gather_rows, sum_over_processes
from lg.errors import NonFiniteLossError

LOSS_TERMS = ("loss", "cls", "inter", "logit")
COLUMNS = (*LOSS_TERMS, "top1_wrong", "top5_wrong", "count")
_TERMS = len(LOSS_TERMS)
UNKNOWN_ERR = 100.0  # percent; before the first test

NON_FINITE_ADVICE = (
    "The last checkpoint is not affected. Lower OPTIM.BASE_LR, lengthen "
    "OPTIM.WARMUP_EPOCHS, set OPTIM.CLIP_GRAD_NORM, or set TRAIN.MIXED_PRECISION False."
)


def topk_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return whether each label has the highest score, and one of the five highest.

    Args:
        logits: [N, K].
        labels: [N], class indices.

    Returns:
        [N, 2], bool. A row with non-finite logits is never a hit.
    """
    hits = top_classes(logits, 5) == labels[:, None]
    return torch.stack([hits[:, 0], hits.any(dim=1)], dim=1)


def top_classes(logits: Tensor, k: int) -> Tensor:
    """Return the k highest classes (or all K) of each row, [N, k], best first; -1 in every place of
    a row with non-finite logits."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return top.masked_fill(~logits.isfinite().all(dim=1, keepdim=True), -1)


@dataclass(frozen=True)
class EvalResult:
    """The result of a test, in percent; lists have one entry per class."""

    top1_err: float
    top5_err: float
    balanced_acc: float  # mean accuracy of the classes that have samples
    macro_f1: float  # mean F1 score of the classes that have samples or are predicted
    calibration_err: float  # expected calibration error, 15 bins of equal width
    count: int
    class_counts: list[int]
    class_top1_acc: list[float]  # percent; NaN for a class without samples
    # Counts [K, K + 1]: rows are labels, columns predicted classes; last, non-finite logits.
    confusion: list[list[int]] = field(default_factory=list)

    @property
    def rates(self) -> dict[str, float]:
        """The numbers that describe all classes together, by name."""
        names = ("top1_err", "top5_err", "balanced_acc", "macro_f1", "calibration_err")
        return {name: getattr(self, name) for name in names}


class TestMeter:
    """Counts of a test; they stay on the device until `result` reads them."""

    __test__ = False  # not a test case

    def __init__(self, num_classes: int, device: torch.device) -> None:
        shape = num_classes, num_classes + 1
        # Rows: labels. Columns: predicted classes, and last the rows with non-finite logits.
        self._confusion = torch.zeros(shape, dtype=torch.int64, device=device)
        self._top5 = torch.zeros((), dtype=torch.int64, device=device)
        self._confidences = [torch.zeros(0, 2, device=device)]  # confidence and hit of each sample

    def add(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Add a batch: logits [N, K] and labels [N].

        Returns:
            The predicted classes [N]; -1 where logits are not finite.
        """
        top = top_classes(logits, 5)
        hits = top == labels[:, None]
        self._confusion.index_put_((labels, top[:, 0]), torch.ones_like(labels), accumulate=True)
        self._top5 += hits.any(dim=1).sum()
        confidence = logits.float().softmax(dim=1).amax(dim=1).nan_to_num()
        self._confidences.append(torch.stack([confidence, hits[:, 0].float()], dim=1))
        return top[:, 0]

    def result(self) -> EvalResult:
        """Return the result over all processes; every process calls this."""
        confusion = sum_over_processes(self._confusion).cpu().numpy()
        top5_hits = int(sum_over_processes(self._top5))
        counts, hits = confusion.sum(axis=1), confusion.diagonal()
        count = int(counts.sum())
        balanced_acc, macro_f1 = _class_means(confusion)
        return EvalResult(
            top1_err=100 - 100 * int(hits.sum()) / count,
            top5_err=100 - 100 * top5_hits / count,
            balanced_acc=balanced_acc,
            macro_f1=macro_f1,
            calibration_err=_calibration_error(torch.cat(self._confidences)),
            count=count,
            class_counts=counts.tolist(),
            class_top1_acc=[
                100 * h / n if n else math.nan for h, n in zip(hits, counts, strict=True)
            ],
            confusion=confusion.tolist(),
        )


def _class_means(confusion: np.ndarray) -> tuple[float, float]:
    """Return balanced accuracy and macro-F1 in percent of a confusion matrix [K, K + 1]."""
    from sklearn.metrics import f1_score, recall_score  # slow to import

    labels, predicted = np.nonzero(confusion)
    weights = confusion[labels, predicted]
    known = np.union1d(labels, predicted[predicted < len(confusion)])
    options = {"average": "macro", "sample_weight": weights, "zero_division": 0}
    balanced_acc = recall_score(labels, predicted, labels=np.unique(labels), **options)
    macro_f1 = f1_score(labels, predicted, labels=known, **options)
    return 100 * float(balanced_acc), 100 * float(macro_f1)


def _calibration_error(confidences: Tensor) -> float:
    """Return the expected calibration error in percent.

    Args:
        confidences: [n, 2], confidence and hit (0 or 1) of this process's samples.

    Source: arXiv 1706.04599.
    """
    # Slow to import.
    from torchmetrics.functional.classification import binary_calibration_error
    from torchmetrics.utilities.distributed import gather_all_tensors

    if dist.is_initialized():
        confidences = torch.cat(gather_all_tensors(confidences))  # shares differ in length
    confidence, hits = confidences.cpu().T.contiguous()
    confidence = confidence.clamp(max=1 - 2**-24)  # torchmetrics puts 1 in a bin of its own
    return 100 * float(binary_calibration_error(confidence, hits.long(), n_bins=15, norm="l1"))


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
