"""The losses against numbers computed by hand, and their sum."""

from __future__ import annotations

import math

import pytest
import torch

from lg.guidance.losses import GuidanceLoss, imitation_loss, logit_loss

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
TEACHER = torch.tensor([[1.0, 1.0, 0.0], [4.0, 0.0, 0.0]])
TARGETS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])


def softmax(scores: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(s / temperature) for s in scores]
    return [p / sum(powers) for p in powers]


def cross_entropy(scores: torch.Tensor, targets: torch.Tensor) -> float:
    rows = zip(scores.tolist(), targets.tolist(), strict=True)
    return sum(
        -t * math.log(p) for s, ts in rows for p, t in zip(softmax(s), ts, strict=True)
    ) / len(scores)


def test_soft_logit_loss_is_the_divergence_times_the_squared_temperature() -> None:
    rows = zip(LOGITS.tolist(), TEACHER.tolist(), strict=True)
    expected = sum(
        t * (math.log(t) - math.log(s))
        for student, teacher in rows
        for s, t in zip(softmax(student, 3.0), softmax(teacher, 3.0), strict=True)
    )
    value = logit_loss(LOGITS, TEACHER, kind="soft", temperature=3.0)
    assert value.item() == pytest.approx(9 * expected / 2, rel=1e-5)


def test_standardized_logits_have_mean_0_and_variance_1() -> None:
    def z_scores(row: list[float]) -> list[float]:
        mean = sum(row) / len(row)
        return [(v - mean) / (sum((w - mean) ** 2 for w in row) / len(row)) ** 0.5 for v in row]

    rows = zip(LOGITS.tolist(), TEACHER.tolist(), strict=True)
    expected = sum(
        t * (math.log(t) - math.log(s))
        for student, teacher in rows
        for s, t in zip(
            softmax(z_scores(student), 2.0), softmax(z_scores(teacher), 2.0), strict=True
        )
    )
    value = logit_loss(LOGITS, TEACHER, temperature=2.0, standardize=True)
    assert value.item() == pytest.approx(4 * expected / 2, rel=1e-4)
    # Classifiers start with equal logits.
    zeros = torch.zeros(2, 3, requires_grad=True)
    logit_loss(zeros, TEACHER, standardize=True).backward()
    assert zeros.grad is not None and zeros.grad.isfinite().all()


def test_hard_logit_loss_is_cross_entropy_with_the_teachers_argmax() -> None:
    argmax = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    value = logit_loss(LOGITS, TEACHER, kind="hard")
    assert value.item() == pytest.approx(cross_entropy(LOGITS, argmax), rel=1e-5)


def test_linear_compares_at_the_larger_height_and_width() -> None:
    student = torch.arange(8.0).reshape(1, 1, 4, 2)
    teacher = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])  # one row of four
    # Bilinear, align_corners False: the student's rows widen to a, 3a/4 + b/4, a/4 + 3b/4, b.
    rows = [
        [a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, b]
        for a, b in ((0, 1), (2, 3), (4, 5), (6, 7))
    ]
    expected = (
        sum((v - t) ** 2 for row in rows for v, t in zip(row, (1, 2, 3, 4), strict=True)) / 16
    )
    assert imitation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_gram_compares_channel_products_whatever_the_sizes() -> None:
    student = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])  # two channels, 1 x 2
    teacher = torch.tensor([[[[1.0]], [[2.0]]]])  # two channels, 1 x 1
    # Gram over H W: student (1+4, 3+0; 3, 9) / 2, teacher (1, 2; 2, 4).
    expected = ((2.5 - 1) ** 2 + 2 * (1.5 - 2) ** 2 + (4.5 - 4) ** 2) / 4
    assert imitation_loss(student, teacher, "gram").item() == pytest.approx(expected)


def test_attention_ignores_the_scale_of_the_maps() -> None:
    student, teacher = torch.rand(2, 5, 3, 3), torch.rand(2, 7, 3, 3)
    value = imitation_loss(student, teacher, "attention")
    assert value > 0
    torch.testing.assert_close(imitation_loss(9 * student, teacher, "attention"), value)


def test_similarity_ignores_the_scale_of_the_maps() -> None:
    maps = torch.rand(3, 4, 2, 2)
    assert imitation_loss(maps, 5 * maps, "similarity").item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(
    ("student", "teacher", "transform", "message"),
    [
        ((2, 3, 4, 4), (2, 5, 4, 4), "linear", "student_map has 3 channels, teacher_map 5"),
        ((2, 3, 4, 4), (2, 5, 4, 4), "gram", "student_map has 3 channels, teacher_map 5"),
        ((2, 3, 4, 4), (3, 3, 4, 4), "linear", "student_map holds 2 images, teacher_map 3"),
        ((2, 3, 4, 4), (2, 3, 4, 4), "l2", "transform is 'l2'; allowed: linear, gram"),
    ],
)
def test_incomparable_maps_are_rejected(
    student: tuple, teacher: tuple, transform: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        imitation_loss(torch.zeros(student), torch.zeros(teacher), transform)


def test_the_terms_add_up() -> None:
    student = [torch.rand(2, 3, 4, 4), torch.rand(2, 3, 2, 2)]
    teacher = [torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)]
    loss = GuidanceLoss(
        inter_weight=2.5, logit_weight=0.3, temperature=2.0, standardize=True, transform="gram"
    )
    terms = loss((LOGITS, LOGITS + TEACHER), student, TARGETS, teacher, TEACHER)
    cls = cross_entropy(LOGITS, TARGETS)
    inter = sum(imitation_loss(s, t, "gram").item() for s, t in zip(student, teacher, strict=True))
    # The first head learns the labels, the second imitates.
    logit = logit_loss(LOGITS + TEACHER, TEACHER, temperature=2.0, standardize=True).item()
    assert terms["cls"].item() == pytest.approx(cls, rel=1e-5)
    assert terms["inter"].item() == pytest.approx(inter, rel=1e-5)
    assert terms["logit"].item() == pytest.approx(logit, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(0.7 * cls + 0.3 * logit + 2.5 * inter, rel=1e-5)


def test_without_guidance_the_loss_is_cross_entropy() -> None:
    terms = GuidanceLoss()(LOGITS, [], TARGETS)
    assert terms["loss"].item() == pytest.approx(cross_entropy(LOGITS, TARGETS), rel=1e-5)
    assert terms["inter"] == terms["logit"] == 0


def test_half_precision_maps_are_compared_in_float32() -> None:
    student, teacher = torch.rand(2, 3, 4, 4).half(), torch.rand(2, 3, 4, 4).half()
    value = imitation_loss(100 * student, 100 * teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value, imitation_loss((100 * student).float(), (100 * teacher).float())
    )


def test_a_distillation_token_learns_labels_after_the_end() -> None:
    loss = GuidanceLoss(logit_weight=0.5)
    pair = tuple(torch.randn(2, 3, requires_grad=True) for _ in range(2))
    loss(pair, [], torch.eye(3)[:2], factor=0.0)["loss"].backward()
    for logits in pair:
        expected = (logits.detach().softmax(dim=1) - torch.eye(3)[:2]) / 2  # of the mean over 2
        torch.testing.assert_close(logits.grad, 0.5 * expected)


def test_classes_are_weighted_after_the_end() -> None:
    weights = torch.tensor([0.5, 2.0, 1.0])
    loss = GuidanceLoss(logit_weight=0.5, class_weights=weights)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    terms = loss(logits, [], torch.eye(3)[labels], factor=0.0)
    torch.testing.assert_close(terms["loss"], terms["cls"])
