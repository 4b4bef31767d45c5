"""Fit image size, batch, length and recipe to the amount of data and the speed of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, sqrt

from lg.tools.init.folder import FolderFacts
from lg.tools.init.speed import Speed

# Sides of the student's images in pixels, and the patches of models whose patches can be chosen,
# so that there are 64 to 196 tokens.
PATCHES = {224: 16, 96: 8, 64: 8, 32: 4}
GUIDE_SIDE = 32  # pixels, as published
MAX_EPOCHS = 300  # as published
# Less hardly trains a transformer, whatever the time.
MIN_EPOCHS = 15
MIN_STEPS = 600
# With fewer epochs, smaller images and more epochs are better than larger images.
ENOUGH_EPOCHS = 60
# Epochs and steps from which random crops, RandAugment and erasing help (see docs/own-images.md).
STRONG_FROM = 100
STRONG_FROM_STEPS = 2000
_GUIDE_SHARE = 0.3  # of the time


@dataclass(frozen=True)
class Length:
    """How long one model trains.

    Attributes:
        epochs: Number of epochs.
        steps: Optimiser steps of an epoch.
        minutes: Estimate for training and tests on this machine.
        mixed: Whether mixed precision is faster here.
    """

    epochs: int
    steps: int
    minutes: float
    mixed: bool

    @property
    def warmup(self) -> int:
        """Epochs of warm-up: a fifteenth, as published, and less than the training."""
        return min(max(1, round(self.epochs / 15)), self.epochs - 1)

    @property
    def strong(self) -> bool:
        """Whether the training is long enough for strong augmentation."""
        is_long = self.epochs * self.steps >= STRONG_FROM_STEPS
        return is_long and self.epochs >= STRONG_FROM

    @property
    def test_period(self) -> int:
        """Epochs between tests: about 20 tests in all."""
        return max(1, self.epochs // 20)


@dataclass(frozen=True)
class Plan:
    """The settings of guide and student."""

    image_size: int
    batch_size: int
    guide: Length
    student: Length
    guide_lr: float
    student_lr: float


def make_plan(
    facts: FolderFacts,
    *,
    minutes: float,
    student_lr: float,
    guide_speed: Speed,
    student_speed: Callable[[int], Speed],
) -> Plan:
    """Return settings with which guide and student train in about `minutes` on this machine.

    Args:
        facts: What the folder holds.
        minutes: Of training in all; at least MIN_EPOCHS epochs and MIN_STEPS steps are
            planned.
        student_lr: Learning rate of the student's own recipe, for batches of 128.
        guide_speed: Of the guide.
        student_speed: From a side in pixels to the speed of the guided student on such images.
    """
    batch = choose_batch(facts.num_train)
    num_tested = sum(facts.sizes) - facts.num_train or facts.splits.get("val", 0)
    guide = _fit(facts.num_train, batch, num_tested, guide_speed, minutes * _GUIDE_SHARE)
    left, sizes = minutes - guide.minutes, choose_sizes(facts.side)
    size, student = 0, guide
    for tried in sizes:  # a large size is measured only where it may fit
        longest = _fit(facts.num_train, batch, num_tested, student_speed(tried), left)
        fits = longest.epochs >= ENOUGH_EPOCHS and longest.minutes <= 1.1 * left
        if fits or not size:
            size, student = tried, longest
        if not fits:
            break
    return Plan(
        image_size=size,
        batch_size=batch,
        guide=guide,
        student=student,
        guide_lr=_rounded(0.1 * batch / 128),  # linear scaling for SGD
        student_lr=_rounded(student_lr * sqrt(batch / 128)),  # square root scaling for AdamW
    )


def choose_batch(num_images: int) -> int:
    """Return a batch size with at least about ten steps in an epoch, 8 to 128."""
    batch = 128
    while batch > 8 and num_images < 10 * batch:
        batch //= 2
    return max(1, min(batch, num_images))


def choose_sizes(side: int) -> list[int]:
    """Return sides to try, smallest first: 32 for tiny images, and others that enlarge little."""
    return [size for size in sorted(PATCHES)[1:] if size <= 1.5 * side] or [min(PATCHES)]


def _fit(num_train: int, batch: int, num_tested: int, speed: Speed, minutes: float) -> Length:
    """Return the longest training that takes at most `minutes`, within its limits.

    A test of an image takes about a third of the time to train on it.
    """
    steps = max(1, num_train // batch)
    epoch = speed.seconds * steps * batch / 60
    least = max(MIN_EPOCHS, ceil(MIN_STEPS / steps))
    epochs = min(MAX_EPOCHS, max(least, int(minutes / epoch)))
    period = max(1, epochs // 20)
    tests = ceil(epochs / period) * num_tested * speed.seconds / 3 / 60
    return Length(epochs, steps, epochs * epoch + tests, speed.mixed)


def _rounded(value: float) -> float:
    """Return a value with two significant digits."""
    return float(f"{value:.1e}")
