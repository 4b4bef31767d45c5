"""95 % confidence intervals: of an accuracy over images, and of a mean over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def wilson_interval(num_hits: int, count: int) -> tuple[float, float]:
    """Return the Wilson interval of an accuracy in percent."""
    interval = stats.binomtest(num_hits, count).proportion_ci(0.95, method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return a mean and half its interval (Student t); None for one value."""
    if len(values) == 1:
        return values[0], None
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(np.array(values))
    return float(np.mean(values)), float(half)
