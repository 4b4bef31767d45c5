"""Metrics: hits, running means, and the step of a non-finite loss."""

from __future__ import annotations

import math

import pytest
import torch

from lg.errors import NonFiniteLossError
from lg.logs.results import describe
from lg.metrics import TestMeter, TrainMeter, topk_hits


def naive_hit(scores: list[float], label: int, k: int) -> bool:
    """Return whether fewer than k scores are higher."""
    return sum(s > scores[label] for s in scores) < k


@pytest.mark.parametrize("num_classes", [2, 3, 4, 5, 10, 100])
def test_hits_equal_a_naive_count(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(64, num_classes, generator=generator)
    labels = torch.randint(num_classes, (64,), generator=generator)
    hits = topk_hits(logits, labels)
    assert hits.dtype == torch.bool and hits.shape == (64, 2)
    wanted = [
        [naive_hit(row, label, k) for k in (1, 5)]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    assert hits.tolist() == wanted
    assert 0 < hits.sum() < 128
    if num_classes <= 5:
        assert hits[:, 1].all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_row_is_never_a_hit(bad: float) -> None:
    logits = torch.eye(6)
    logits[2, 2] = bad
    logits[4, 0] = bad
    hits = topk_hits(logits, torch.arange(6))
    assert hits[:, 0].tolist() == [True, True, False, True, False, True]
    assert hits[:, 1].tolist() == [True, True, False, True, False, True]
    assert not topk_hits(torch.full((3, 2), math.nan), torch.tensor([0, 1, 0])).any()


CPU = torch.device("cpu")


def logits_of(rows: list[tuple[int, float]]) -> torch.Tensor:
    """Return logits of two classes that predict a class with a confidence, for each row."""
    high = [math.log(confidence / (1 - confidence)) for _, confidence in rows]
    return torch.tensor(
        [[h, 0.0] if c == 0 else [0.0, h] for (c, _), h in zip(rows, high, strict=True)]
    )


# Label, predicted class and its confidence: 4 + 1 samples of class 0, 2 of class 1.
SAMPLES = [
    (0, 0, 0.9),
    (0, 0, 0.9),
    (0, 0, 0.72),
    (0, 1, 0.9),
    (0, 0, 0.72),
    (1, 1, 0.72),
    (1, 0, 0.9),
]
# Class 0: 4 of 5 right, 5 predicted, F1 2*4/(5+5). Class 1: 1 of 2, 2 predicted, F1 2*1/(2+2).
# Bin of 0.9 (0.867 to 0.933): 4 samples, 2 right. Bin of 0.72 (0.667 to 0.733): 3 samples, 3 right.
BY_HAND = {
    "top1_err": 100 * 2 / 7,
    "top5_err": 0.0,
    "balanced_acc": 100 * (4 / 5 + 1 / 2) / 2,
    "macro_f1": 100 * (0.8 + 0.5) / 2,
    "calibration_err": 100 * (4 / 7 * abs(2 / 4 - 0.9) + 3 / 7 * abs(1 - 0.72)),
}


def test_a_result_equals_one_computed_by_hand() -> None:
    meter = TestMeter(2, CPU)
    for samples in (SAMPLES[:3], SAMPLES[3:]):
        labels = torch.tensor([label for label, _, _ in samples])
        meter.add(logits_of([(c, p) for _, c, p in samples]), labels)
    result = meter.result()
    assert result.rates == pytest.approx(BY_HAND, abs=1e-4)
    assert (result.count, result.class_counts, result.class_top1_acc) == (7, [5, 2], [80.0, 50.0])
    assert describe(result) == (
        "top-1 71.43 % of 7 images; balanced accuracy 65.00 %, macro-F1 65.00 %, expected "
        "calibration error 34.86 %"
    )


def test_classes_without_samples_and_rows_that_are_not_finite() -> None:
    meter = TestMeter(8, CPU)
    logits = torch.eye(8)[[0, 0, 2, 6]] * 20
    logits[2] += torch.arange(8.0).flip(0)  # class 1 comes after 2 and 0
    logits[3, 1] = math.nan
    meter.add(logits, torch.tensor([0, 0, 1, 6]))
    result = meter.result()
    assert result.top1_err == result.top5_err + 25 == 50  # class 1 is among the first five
    assert result.class_counts == [2, 1, 0, 0, 0, 0, 1, 0]
    assert math.isnan(result.class_top1_acc[2]) and result.class_top1_acc[6] == 0
    # Accuracies of classes 0, 1 and 6; F1 of these and of class 2, which is only predicted.
    assert result.balanced_acc == pytest.approx(100 / 3)
    assert result.macro_f1 == pytest.approx(100 / 4)
    assert "top-5" in describe(result)


def losses(cls: float, inter: float = 0.0, logit: float = 0.0) -> dict[str, torch.Tensor]:
    values = {"loss": cls + inter + logit, "cls": cls, "inter": inter, "logit": logit}
    return {k: torch.tensor(v, requires_grad=True) for k, v in values.items()}


def hits(count: int, top1: int, top5: int) -> torch.Tensor:
    columns = [[n < top1, n < top5] for n in range(count)]
    return torch.tensor(columns)


def test_means_are_weighted_by_the_number_of_images() -> None:
    meter = TrainMeter()
    meter.add(losses(1.0, 0.5, 0.25), hits(10, 2, 8))
    meter.add(losses(4.0, 2.0, 1.0), hits(30, 30, 30))
    meter.collect(epoch=0, step=2)
    wanted = {
        "loss": (10 * 1.75 + 30 * 7.0) / 40,
        "cls": (10 * 1 + 30 * 4) / 40,
        "inter": (10 * 0.5 + 30 * 2) / 40,
        "logit": (10 * 0.25 + 30) / 40,
        "top1_err": 100 * 8 / 40,
        "top5_err": 100 * 2 / 40,
    }
    assert meter.epoch() == pytest.approx(wanted)
    assert meter.window() == pytest.approx(wanted)


def test_windows_and_epochs_are_independent() -> None:
    meter = TrainMeter()
    for step, value in enumerate((1.0, 2.0, 3.0), start=1):
        meter.add(losses(value), hits(5, 5, 5))
        meter.collect(epoch=0, step=step)
        if step == 2:
            assert meter.window()["cls"] == pytest.approx(1.5)
    assert meter.epoch()["cls"] == pytest.approx(2.0)
    meter.end_epoch()
    meter.add(losses(8.0), hits(5, 0, 0))
    meter.collect(epoch=1, step=1)
    assert meter.epoch()["cls"] == pytest.approx(8.0)
    assert meter.epoch()["top1_err"] == pytest.approx(100.0)
    assert meter.window()["cls"] == pytest.approx(5.5)  # 3 of the old epoch, 8 of the new


def test_collect_without_new_steps_changes_nothing() -> None:
    meter = TrainMeter()
    meter.collect(epoch=0, step=0)
    meter.add(losses(1.0), hits(2, 1, 2))
    meter.collect(epoch=0, step=1)
    before = meter.epoch()
    meter.collect(epoch=0, step=1)
    assert meter.epoch() == before


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_is_reported_with_epoch_step_and_term(bad: float) -> None:
    meter = TrainMeter()
    for step in range(1, 8):
        meter.add(losses(1.0), hits(2, 1, 2))
        if step == 3:
            meter.collect(epoch=4, step=3)
    terms = losses(1.0, 0.5)
    terms["inter"] = terms["loss"] = torch.tensor(bad)
    meter.add(terms, hits(2, 1, 2))  # step 8
    meter.add(losses(math.nan), hits(2, 1, 2))  # what follows is broken by it
    with pytest.raises(NonFiniteLossError) as caught:
        meter.collect(epoch=4, step=9)
    text = str(caught.value)
    assert f"in epoch 5, step 8: loss = {bad}, inter = {bad}. " in text
    assert "cls = " not in text and "OPTIM.BASE_LR" in text


def test_restored_meter_continues_like_the_original() -> None:
    meter = TrainMeter()
    for step, value in enumerate((1.0, 2.0), start=1):
        meter.add(losses(value), hits(step, 1, 1))
    meter.collect(epoch=0, step=2)
    state = meter.state()
    meter.add(losses(7.0), hits(4, 1, 2))
    meter.collect(epoch=0, step=3)
    other = TrainMeter()
    other.load(state)
    assert other.epoch()["cls"] == pytest.approx(5 / 3)
    other.add(losses(7.0), hits(4, 1, 2))
    other.collect(epoch=0, step=3)
    assert other.epoch() == meter.epoch()
    assert other.window() == meter.window()
    assert len(state["window"]) == 2  # neither of the two writes into what was saved


def test_state_requires_collect() -> None:
    meter = TrainMeter()
    meter.add(losses(1.0), hits(2, 1, 2))
    with pytest.raises(AssertionError):
        meter.state()


def test_certain_predictions_share_the_last_bin() -> None:
    """50 wrong at confidence 1, 50 right at 0.95: one bin, 97.5 % sure, 50 % right."""
    meter = TestMeter(2, CPU)
    right = math.log(0.95 / 0.05)
    meter.add(
        torch.tensor([[100.0, 0.0]] * 50 + [[right, 0.0]] * 50), torch.tensor([1] * 50 + [0] * 50)
    )
    assert meter.result().calibration_err == pytest.approx(47.5, abs=1e-3)
