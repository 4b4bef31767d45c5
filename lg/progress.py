"""How far a run is and what it has reached."""

from __future__ import annotations

from dataclasses import dataclass, field

UNKNOWN_ERR = 100.0


@dataclass
class Progress:
    """How far a run is and what it has reached; errors are percent."""

    epoch: int = 0  # epochs done
    step: int = 0  # steps done in the epoch under way
    test_due: bool = False  # after the last epoch done, which has not been tested yet
    test_err: float = UNKNOWN_ERR  # top-1, last test
    ema_err: float = UNKNOWN_ERR
    best_err: float = float("inf")  # the least of both over all tests
    test_count: int = 0  # images in the test split
    # Least errors so far: {"test" | "ema": {"top1_err", "top5_err", "epoch" (of the least top1_err,
    # from 1)}}
    best: dict[str, dict[str, float]] = field(default_factory=dict)
