"""The numbers of a test beside those of `EvalResult`: per class, calibration, differences of runs.

N counts images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from lg.tools.predict import Predictions

NUM_BINS = 15  # of the calibration error, as in training


@dataclass(frozen=True)
class ClassRow:
    """One class of a test; rates in percent.

    Attributes:
        name: The class.
        count: Its images.
        precision: Share of what was predicted as the class that belongs to it.
        recall: Share of its images that were predicted as it: its accuracy.
        f1: Harmonic mean of both.
    """

    name: str
    count: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Reliability:
    """How far confidence and accuracy agree, in bins of equal width; empty bins are left out.

    Attributes:
        confidence: Mean confidence of each bin, percent.
        accuracy: Accuracy of each bin, percent.
        counts: Images in each bin.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Difference:
    """Accuracy of one model minus that of another on the same images.

    Attributes:
        points: Percentage points.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p_value: Of the exact McNemar test.
        only_first: Images that only the first model gets wrong.
        only_second: Images that only the second model gets wrong.
    """

    points: float
    low: float
    high: float
    p_value: float
    only_first: int
    only_second: int


def hits(result: Predictions) -> np.ndarray:
    """Return whether each image was classified correctly, [N] bool."""
    return result.predicted == result.labels


def class_rows(result: Predictions) -> list[ClassRow]:
    """Return precision, recall and F1 of each class; 0 where there is nothing to divide by."""
    from sklearn.metrics import precision_recall_fscore_support  # slow to import

    rates = precision_recall_fscore_support(
        result.labels,
        result.predicted,
        labels=range(len(result.class_names)),
        zero_division=0,
    )
    return [
        ClassRow(name, int(count), 100 * float(precision), 100 * float(recall), 100 * float(f1))
        for name, precision, recall, f1, count in zip(result.class_names, *rates, strict=True)
    ]


def reliability(result: Predictions) -> Reliability:
    """Compare the confidence of predictions with their accuracy."""
    confidence = result.probabilities.max(axis=1).astype(np.float64)
    bins = np.clip((confidence * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    used = counts > 0
    sums = (np.bincount(bins, weights, NUM_BINS)[used] for weights in (confidence, hits(result)))
    means = [100 * each / counts[used] for each in sums]
    return Reliability(means[0], means[1], counts[used])


def difference(second: Predictions, first: Predictions) -> Difference:
    """Compare two models on the same images: the accuracy of `second` minus that of `first`.

    The interval is the normal one for pairs. It holds for these two sets of weights: how much a
    training with another seed differs is not in it.
    """
    a, b = hits(first), hits(second)
    only_first, only_second = int((b & ~a).sum()), int((a & ~b).sum())
    gain = b.astype(float) - a.astype(float)
    half = stats.norm.ppf(0.975) * gain.std(ddof=1) / np.sqrt(len(gain))
    num_pairs = only_first + only_second
    p_value = stats.binomtest(only_first, num_pairs).pvalue if num_pairs else 1.0
    mean = gain.mean()
    low, points, high = (100 * float(value) for value in (mean - half, mean, mean + half))
    return Difference(points, low, high, float(p_value), only_first, only_second)


def same_images(first: Predictions, second: Predictions) -> bool:
    """Return whether two tests are of the same images, classes and labels."""
    return (
        first.images == second.images
        and first.class_names == second.class_names
        and np.array_equal(first.labels, second.labels)
    )
