"""Resizing: a slice, a product or `F.interpolate`, all with the same result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from lg.guidance.resize import resize


def interpolated(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("old", "new"),
    [((224, 224), (32, 32)), ((96, 96), (32, 32)), ((15, 27), (5, 3)), ((7, 9), (7, 3))],
)
def test_odd_factors_take_the_centres_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, old: tuple[int, int], new: tuple[int, int]
) -> None:
    images = torch.randn(2, 3, *old, generator=torch.Generator().manual_seed(0))
    expected = interpolated(images, new)
    monkeypatch.setattr(F, "interpolate", None)  # not called
    assert torch.equal(resize(images, new), expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [((96, 96), (16, 16)), ((224, 224), (64, 64)), ((8, 8), (14, 14)), ((14, 7), (32, 16))],
)
def test_other_factors_are_interpolated(old: tuple[int, int], new: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *old)
    assert torch.equal(resize(images, new), interpolated(images, new))
    assert resize(images, old) is images


@pytest.mark.parametrize(
    ("old", "new"),
    [((14, 14), (32, 32)), ((8, 8), (14, 14)), ((96, 96), (16, 16)), ((14, 7), (32, 16))],
)
def test_deterministic_products_equal_interpolation(
    deterministic: None,
    monkeypatch: pytest.MonkeyPatch,
    old: tuple[int, int],
    new: tuple[int, int],
) -> None:
    for dtype in (torch.float32, torch.float64):
        tolerance = 8 * torch.finfo(dtype).eps
        features = torch.randn(2, 5, *old, dtype=dtype, requires_grad=True)
        weights = torch.randn(2, 5, *new, dtype=dtype)
        expected = interpolated(features, new)
        (expected_grad,) = torch.autograd.grad((expected * weights).sum(), features)
        resize(features, new)  # makes the matrices
        with monkeypatch.context() as patch:
            patch.setattr(F, "interpolate", None)
            with torch.autocast("cpu", torch.bfloat16):
                found = resize(features, new)
        (grad,) = torch.autograd.grad((found * weights).sum(), features)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=2 * tolerance)
        torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=8 * tolerance)
