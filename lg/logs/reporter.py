"""The stats, curves and console lines of training and testing, under the names of the published
logs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from lg.device import MAX_CORE_WAIT, core_wait_advice, core_wait_seconds, peak_memory_mb
from lg.logs.log import RunLog, format_time
from lg.logs.pictures import MIXTURE, Pictures
from lg.logs.results import describe_protocol
from lg.metrics import EvalResult

if TYPE_CHECKING:
    from lg.run import Progress


# A test is reported if its top-1 is this many points below the published curve. Where that curve is
# steepest (0.75 points per epoch), this is 7 epochs of training; smaller gaps may be chance.
FAR_OFF = 5.0


@dataclass
class Reporter:
    """Formats and times training for the log.

    Attributes:
        log: Receives the output.
        pictures: Receives the numbers of each epoch and the results of tests.
        device: Its peak memory is reported.
        split: Name of the split that is tested during training, such as cifar100/test.
        final_split: Name of the test set that is tested at the end; empty if there is none.
        steps_per_epoch: Optimiser steps per epoch.
        max_epoch: Number of epochs.
        batch_size: Images per step, over all processes.
        num_classes: Number of classes; top-5 is left out of curves and tables for 5 or fewer.
        inter: Whether features are imitated.
        logit: Whether logits are imitated.
        published: Published test top-1 in percent by epoch (from 1); empty if unknown.
    """

    log: RunLog
    pictures: Pictures
    device: torch.device
    split: str
    final_split: str
    steps_per_epoch: int
    max_epoch: int
    batch_size: int
    num_classes: int
    inter: bool
    logit: bool
    published: dict[int, float] = field(default_factory=dict)
    _is_far_off: bool = False  # reported once
    _lacked_cores: bool = False  # reported once
    _waited: float = 0.0  # seconds without a core before the epoch
    _steps: int = 0
    _started: float = field(default_factory=time.perf_counter)
    _last: float = 0.0
    _difference: float = 0.0  # seconds of the last step
    _train_line: str = ""
    # Of the last epoch, by kind: "test" and, with a weight average, "ema".
    _last_tests: dict[str, EvalResult] = field(default_factory=dict)

    def start_epoch(self, epoch: int, step: int) -> None:
        """Start the clock at a step of an epoch (both counted from 0)."""
        self._steps, self._started = 0, time.perf_counter()
        self._last = self._started
        self._waited = core_wait_seconds()
        self.log.start_bar(
            f"epoch {epoch + 1}/{self.max_epoch}", total=self.steps_per_epoch, done=step
        )

    def count_step(self) -> None:
        """Count and time a step; at log points, call this after synchronising the device."""
        now = time.perf_counter()
        self._difference, self._last = now - self._last, now
        self._steps += 1

    def iteration(self, means: dict[str, float], *, epoch: int, step: int, lr: float) -> None:
        """Report a log point after `step` steps of an epoch (counted from 0)."""
        total = epoch * self.steps_per_epoch + step
        average = (time.perf_counter() - self._started) / self._steps
        eta = average * (self.steps_per_epoch * self.max_epoch - total)
        losses = self._losses(means)
        self.log.stats(
            "train_iter",
            {
                "epoch": f"{epoch + 1}/{self.max_epoch}",
                "iter": f"{step}/{self.steps_per_epoch}",
                "total_iter": total,
                "time_avg": average,
                "time_diff": self._difference,
                "images_per_second": self.batch_size / average,
                "eta": format_time(eta),
                "top1_err": means["top1_err"],
                "top5_err": means["top5_err"],
                **losses,
                "lr": lr,
                "mem": peak_memory_mb(self.device),
            },
        )
        self._scalars(
            total,
            {
                **{f"iteration/{name}": value for name, value in losses.items()},
                "iteration/top1_acc": 100 - means["top1_err"],
                "iteration/top5_acc": 100 - means["top5_err"],
            },
        )
        self.log.advance(
            f"epoch {epoch + 1}/{self.max_epoch} step {step}/{self.steps_per_epoch}  "
            f"loss {means['loss']:.4f}  {self.batch_size / average:,.0f} images/s  "
            f"eta {format_time(eta)}"
        )

    def train_epoch(
        self,
        means: dict[str, float],
        *,
        epoch: int,
        lr: float,
        factor: float,
        mixture: list[list[float]],
    ) -> None:
        """Report the training of an epoch.

        Args:
            means: Losses and errors.
            epoch: Counted from 0.
            lr: Learning rate.
            factor: Of guidance.
            mixture: Weight of each block for each guide stage; empty if no blocks are mixed.
        """
        self.log.close_bar()
        losses = self._losses(means)
        guided = {"guidance_factor": factor} if self.inter or self.logit else {}
        weights = _mixture_scalars(mixture)
        seconds = time.perf_counter() - self._started
        self._check_cores(seconds)
        average = seconds / max(self._steps, 1)
        eta = average * self.steps_per_epoch * (self.max_epoch - epoch - 1)
        self.log.stats(
            "train_epoch",
            {
                "epoch": f"{epoch + 1}/{self.max_epoch}",
                "time_avg": average,
                "time_epoch": average * self.steps_per_epoch,  # even after a resume within it
                "eta": format_time(eta),
                "top1_err": means["top1_err"],
                "top5_err": means["top5_err"],
                **losses,
                **guided,
                **({"mixture": mixture} if mixture else {}),
                "lr": lr,
                "mem": peak_memory_mb(self.device),
            },
        )
        self._scalars(
            epoch + 1,
            {
                "epoch/loss": means["loss"],
                "epoch/learning_rate": lr,
                **{f"epoch/{name}": value for name, value in guided.items()},
                **weights,
                "epoch/top1_acc": 100 - means["top1_err"],
                "epoch/top5_acc": 100 - means["top5_err"],
            },
        )
        errors = {f"train_{key}": means[key] for key in ("top1_err", "top5_err")}
        row = {**losses, **guided, **errors, "lr": lr, "seconds": seconds, **weights}
        self.pictures.train_row(epoch + 1, self._without_top5(row))
        self._train_line = self._describe_epoch(means, epoch, average, eta)

    def _describe_epoch(
        self, means: dict[str, float], epoch: int, average: float, eta: float
    ) -> str:
        """Return the line of an epoch; average is seconds per step, eta seconds."""
        parts = [f"cls {means['cls']:.4f}"] + [
            f"{n} {means[n]:.4f}" for n in ("inter", "logit") if getattr(self, n)
        ]
        return (
            f"epoch {epoch + 1}/{self.max_epoch}  loss {means['loss']:.4f} ({', '.join(parts)})  "
            f"train top-1 {100 - means['top1_err']:.2f} %  "
            f"{self.batch_size / average:,.0f} images/s  {peak_memory_mb(self.device):,} MB  "
            f"eta {format_time(eta)}"
        )

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        self.log.scalars(step, self._without_top5(values))

    def _without_top5(self, values: dict[str, float]) -> dict[str, float]:
        """Drop top-5 values if there are no more than 5 classes, where they say nothing."""
        return {k: v for k, v in values.items() if self.num_classes > 5 or "top5" not in k}

    def _losses(self, means: dict[str, float]) -> dict[str, float]:
        """Return the losses that are in use, under their names in the log."""
        losses = {"cls_loss": means["cls"], "loss": means["loss"]}
        if self.inter:
            losses["inter_distill_loss"] = means["inter"]
        if self.logit:
            losses["logit_distill_loss"] = means["logit"]
        return losses

    def guidance_ended(self, epoch: int) -> None:
        """Report that the schedule has reached 0 after `epoch` epochs."""
        self.log.info(
            f"Guidance ended after epoch {epoch} of {self.max_epoch} (DISTILLATION.SCHEDULE); "
            "training continues with cross-entropy alone."
        )

    def test_epoch(
        self,
        result: EvalResult,
        best: dict[str, float],
        *,
        epoch: int,
        seconds: float,
        batches: int,
        average: bool,
    ) -> None:
        """Report a test after an epoch.

        Args:
            result: The result of the test.
            best: The lowest errors so far.
            epoch: Counted from 0.
            seconds: Duration of the test.
            batches: Batches of the test on this process.
            average: Whether the weight average was tested.
        """
        self.log.stats(
            "test_ema_epoch" if average else "test_epoch",
            {
                "epoch": f"{epoch + 1}/{self.max_epoch}",
                "split": self.split,
                "time_avg": seconds / batches,
                "time_epoch": seconds,
                **result.rates,
                "min_top1_err": best["top1_err"],
                "min_top5_err": best["top5_err"],
                "mem": peak_memory_mb(self.device),
            },
        )
        prefix = "test_ema" if average else "test"
        self._scalars(
            epoch + 1,
            {
                f"{prefix}/top1_acc": 100 - result.top1_err,
                f"{prefix}/top5_acc": 100 - result.top5_err,
                f"{prefix}/balanced_acc": result.balanced_acc,
                f"{prefix}/macro_f1": result.macro_f1,
                f"{prefix}/calibration_err": result.calibration_err,
                f"{prefix}/max_top1_acc": 100 - best["top1_err"],
                f"{prefix}/max_top5_acc": 100 - best["top5_err"],
            },
        )
        name = f"{'EMA ' if average else ''}{self.split}"
        accuracy, highest = 100 - result.top1_err, 100 - best["top1_err"]
        kind = "ema" if average else "test"
        rates = self._without_top5(result.rates)
        self.pictures.test_row(epoch + 1, {f"{kind}_{key}": v for key, v in rates.items()})
        self._last_tests = {**(self._last_tests if average else {}), kind: result}
        if not self._train_line:  # the run was resumed after the epoch's training
            self._train_line = f"epoch {epoch + 1}/{self.max_epoch}"
        if not average:
            self._compare(accuracy, epoch + 1)
        self._train_line += f"  {name} top-1 {accuracy:.2f} % (best {highest:.2f})"

    def _compare(self, accuracy: float, epoch: int) -> None:
        """Warn once if an epoch (from 1) is far below the published curve."""
        epochs, published = [*self.published], [*self.published.values()]
        if not epochs or self._is_far_off or not epochs[0] <= epoch <= epochs[-1]:
            return
        expected = float(np.interp(epoch, epochs, published))
        if accuracy < expected - FAR_OFF:
            self._is_far_off = True
            self.log.warn(
                f"Top-1 of epoch {epoch} is {accuracy:.1f} %; published runs with this model, data "
                f"and guidance have about {expected:.1f} %. Compare TRAIN.BATCH_SIZE, the OPTIM "
                "settings, the guide's accuracy and DISTILLATION.TEACHER_BN with theirs."
            )

    def _check_cores(self, seconds: float) -> None:
        """Warn once if an epoch of `seconds` on a CPU was spent waiting for a core."""
        share = (core_wait_seconds() - self._waited) / seconds
        if self.device.type == "cpu" and share > MAX_CORE_WAIT and not self._lacked_cores:
            self._lacked_cores = True
            self.log.warn(
                f"Training waited {share:.0%} of the epoch for a core. {core_wait_advice()}"
            )

    def end_epoch(self, *, is_last: bool) -> None:
        """Print the line of the epoch; after the last one, draw what the test confused."""
        self.log.info(self._train_line)
        self.pictures.end_epoch(is_last=is_last)
        if is_last and self._last_tests and not self.final_split:
            kind, result = min(self._last_tests.items(), key=lambda test: test[1].top1_err)
            when = "weight average after the last epoch" if kind == "ema" else "last epoch"
            self.pictures.confusion_matrix(result, split=self.split, when=when)

    def final_test(self, progress: Progress, result: EvalResult) -> None:
        """Report the final test of the best weights."""
        when = f"best epoch ({progress.best_epoch})"
        self.pictures.confusion_matrix(result, split=self.final_split, when=when)
        stats = {"split": self.final_split, "best_epoch": progress.best_epoch, **progress.final}
        self.log.stats("final_test", stats)

    def finished(self, progress: Progress) -> None:
        """Print the last line of a run: accuracies, and which split chose the best epoch."""
        best = {kind: (b["top1_err"], int(b["epoch"])) for kind, b in progress.best.items()}
        parts = [f"last {100 - progress.test_err:.2f} %", _best(best["test"])]
        if "ema" in best:
            parts += [f"EMA last {100 - progress.ema_err:.2f} %", f"EMA {_best(best['ema'])}"]
        summary = "; ".join(f"{part} on {self.split}" for part in parts)
        epochs = f"{progress.epoch} epoch{'s' * (progress.epoch != 1)}"
        early = f" of {self.max_epoch} (TRAIN.EARLY_STOP)"
        protocol = describe_protocol(progress.final, self.split, self.final_split)
        self.log.info(
            f"Finished {epochs}{early if progress.epoch < self.max_epoch else ''}. "
            f"Top-1 of {progress.test_count:,} images: {summary}. {protocol}"
        )


def _best(error_and_epoch: tuple[float, int]) -> str:
    error, epoch = error_and_epoch
    return f"best {100 - error:.2f} % (epoch {epoch})"


def _mixture_scalars(mixture: list[list[float]]) -> dict[str, float]:
    """Name the weight of each block for each guide stage."""
    return {
        f"{MIXTURE}stage_{stage}_block_{block}": weight
        for stage, row in enumerate(mixture)
        for block, weight in enumerate(row)
    }
