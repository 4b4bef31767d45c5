"""When guidance ends: the factors of each schedule, and the adaptive rule on known curves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lg.guidance import GuidanceSchedule


def factors(schedule: GuidanceSchedule, count: int) -> list[float]:
    return [schedule.factor(epoch) for epoch in range(count)]


def test_factors_of_each_schedule() -> None:
    root = math.sqrt(0.5)
    assert factors(GuidanceSchedule("static", max_epoch=3), 3) == [1, 1, 1]
    assert factors(GuidanceSchedule("until", epoch=2, max_epoch=9), 4) == [1, 1, 0, 0]
    linear = GuidanceSchedule("decay_linear", epoch=4, max_epoch=9)
    assert factors(linear, 6) == [1, 0.75, 0.5, 0.25, 0, 0]
    cosine = GuidanceSchedule("decay_cosine", max_epoch=4)
    assert factors(cosine, 5) == pytest.approx([1, (1 + root) / 2, 0.5, (1 - root) / 2, 0])


def end_by_the_rule(losses: list[float], window: int, threshold: float) -> int:
    """Smooth, difference, smooth; return the number of epochs until the threshold is reached."""
    average = np.ones(window) / window
    slopes = np.convolve(np.diff(np.convolve(losses, average, "valid")), average, "valid")
    return 2 * window + int(np.argmax(slopes >= threshold))


@pytest.mark.parametrize("speed", [0.01, 0.03])
def test_the_adaptive_rule_on_a_noisy_curve(speed: float) -> None:
    random = np.random.default_rng(0)
    losses = [9 * math.exp(-speed * e) + 0.3 * random.random() for e in range(300)]
    schedule = GuidanceSchedule("adaptive", max_epoch=300, window=50, threshold=-0.02)
    for epoch, loss in enumerate(losses):
        if schedule.factor(epoch) == 0:
            break
        schedule.observe(loss)
    expected = end_by_the_rule(losses, 50, -0.02)
    assert 100 < expected < 300 and schedule.ended == expected == epoch
    schedule.observe(0.0)  # after the end, nothing is imitated
    assert len(schedule.losses) == expected


def test_the_end_of_a_short_training_by_hand() -> None:
    # 12 of 300 epochs: a window of 2 and a threshold of -0.02 x 25 = -0.5 per epoch.
    schedule = GuidanceSchedule("adaptive", max_epoch=12, window=50, threshold=-0.02)
    # Running means: 9, 7.5, 6, 4.75, 4. Changes: -1.5, -1.5, -1.25, -0.75. Means of two: -1.5,
    # -1.375, -1. The next loss, 3.9, makes these 3.7, -0.3, -0.525; then 3.5: 3.7, 0, -0.15.
    for loss in (10, 8, 7, 5, 4.5, 3.5):
        schedule.observe(loss)
    assert schedule.ended == 0
    schedule.observe(3.9)
    assert schedule.ended == 0
    for loss in (3.5, 3.6):
        schedule.observe(loss)
    assert schedule.ended == 8 and factors(schedule, 2) == [0, 0]


def test_the_state_continues_the_rule() -> None:
    first, second = (GuidanceSchedule("adaptive", max_epoch=12) for _ in range(2))
    for loss in (10, 8, 7):
        first.observe(loss)
    second.load(first.state())
    for loss in (6.9, 6.9):
        first.observe(loss)
        second.observe(loss)
    assert first.state() == second.state() == {"losses": [10, 8, 7, 6.9, 6.9], "ended": 5}
