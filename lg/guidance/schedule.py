"""The weight of guidance over a training: constant, ended after an epoch, decayed, or ended once
the imitation loss stops falling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

KINDS = ("static", "until", "decay_linear", "decay_cosine", "adaptive")
FULL_LENGTH = 300  # epochs of the published trainings, to which the adaptive rule's numbers refer


class GuidanceSchedule:
    """The factor of the guidance terms in each epoch, from 1 to 0; at 0 the guide does not run.

    `adaptive` follows the mean imitation loss of each epoch. It smooths the losses over `window`
    epochs (running mean), takes the difference between successive epochs, and smooths these
    differences over `window` epochs. When the result, which starts clearly negative, has risen to
    `threshold` or above, the student has learned what it can from the guide, and guidance ends for
    good. The smoothed difference needs 2 `window` epochs, so guidance lasts at least that long.

    In a training of L < 300 epochs, an epoch counts as 300 / L epochs: the window is
    floor(window L / 300), at least 1, and the threshold is threshold 300 / L.

    Attributes:
        kind: One of `KINDS`.
        losses: Mean imitation losses of the guided epochs so far (`adaptive` only).
        ended: Number of guided epochs, once `adaptive` has ended guidance; 0 before.
    """

    def __init__(
        self,
        kind: str = "static",
        *,
        epoch: int = 0,
        max_epoch: int = FULL_LENGTH,
        window: int = 50,
        threshold: float = -0.02,
    ) -> None:
        """Start a schedule.

        Args:
            kind: One of `KINDS`.
            epoch: Guided epochs of `until`; epoch at which a decay reaches 0, 0 for `max_epoch`.
            max_epoch: Epochs of the training.
            window: Of `adaptive`, in epochs of a training of 300 or more.
            threshold: Of `adaptive`, loss per epoch of such a training.

        Raises:
            ValueError: The kind is unknown.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}.")
        self.kind = kind
        self._last, self._max_epoch = epoch or max_epoch, max_epoch
        length = min(max_epoch, FULL_LENGTH)
        self._window = max(1, window * length // FULL_LENGTH)
        self._threshold = threshold * FULL_LENGTH / length
        self.losses: list[float] = []
        self.ended = 0

    def factor(self, epoch: int) -> float:
        """Return the factor of an epoch, counted from 0."""
        if self.kind == "adaptive":
            return 0.0 if self.ended else 1.0
        if self.kind == "static":
            return 1.0
        if epoch >= self._last:
            return 0.0
        if self.kind == "decay_linear":
            return 1 - epoch / self._last
        if self.kind == "decay_cosine":
            return (1 + math.cos(math.pi * epoch / self._last)) / 2
        return 1.0

    @property
    def may_end(self) -> bool:
        """Whether the factor may be 0 in an epoch of the training."""
        return self.kind == "adaptive" or self.factor(self._max_epoch - 1) == 0

    def observe(self, loss: float) -> None:
        """Follow the mean imitation loss of an epoch that has just ended."""
        if self.kind == "adaptive" and not self.ended:
            self.losses.append(loss)
            if smoothed_slope(self.losses, self._window) >= self._threshold:
                self.ended = len(self.losses)

    def state(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {"losses": list(self.losses), "ended": self.ended}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self.losses, self.ended = list(state["losses"]), state["ended"]


def smoothed_slope(losses: Sequence[float], window: int) -> float:
    """Return the smoothed difference of the smoothed losses; -inf for fewer than 2 windows.

    The mean of `window` successive differences of a running mean is the change of that mean over
    `window` epochs, divided by `window`.
    """
    if len(losses) < 2 * window:
        return -math.inf
    return (fmean(losses[-window:]) - fmean(losses[-2 * window : -window])) / window
