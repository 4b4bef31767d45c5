"""RandAugment on gray float images: as on 256 levels up to rounding, but with all levels kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lg.augment.batched import BatchTestTransform, BatchTransform, to_pixels
from lg.augment.randaugment import OPERATIONS, Operations, randaugment
from lg.augment.resample import crop_and_resize, resize_one_by_one, resize_together

LEVELS = {
    "Rotate": 17.3,
    "PosterizeIncreasing": 3,
    "SolarizeIncreasing": 90,
    "SolarizeAdd": 70,
    "ColorIncreasing": 1.8,
    "ContrastIncreasing": 0.4,
    "BrightnessIncreasing": 1.5,
    "SharpnessIncreasing": 1.7,
    "ShearX": 0.2,
    "ShearY": -0.2,
    "TranslateXRel": 0.13,
    "TranslateYRel": -0.21,
}


def smooth(count: int = 3, size: int = 32) -> torch.Tensor:
    """Return smooth gray images [n, 1, S, S] of whole levels."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size]
    waves = [np.sin(x / rng.uniform(3, 9)) * np.cos(y / rng.uniform(3, 9)) for _ in range(count)]
    return torch.from_numpy(np.stack(waves) * 100 + 128).round().float()[:, None]


def apply(name: str, images: torch.Tensor, fill: float = 100) -> torch.Tensor:
    """Apply one operation to every image."""
    shape = (1, len(images))
    draws = Operations(
        np.full(shape, OPERATIONS.index(name)), np.full(shape, LEVELS.get(name, 0.0))
    )
    return randaugment(images, draws, (fill,) * images.shape[1])


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_those_on_256_levels(name: str) -> None:
    gray = smooth()
    wanted = apply(name, gray.to(torch.uint8).expand(-1, 3, -1, -1))
    found = apply(name, gray)
    assert found.dtype == torch.float32 and found.shape == gray.shape
    difference = (found - wanted[:, :1].float()).abs()
    # Tables truncate, means and smoothed pixels are rounded, and equal levels have many ranks.
    limit = {"Equalize": 8, "ContrastIncreasing": 2, "SharpnessIncreasing": 1.5}.get(name, 1.001)
    assert float(difference.max()) <= limit
    assert torch.equal(gray, smooth())  # not modified


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_more_than_256_levels(name: str) -> None:
    rng = np.random.default_rng(1)
    images = torch.from_numpy(rng.uniform(20, 200, (1, 1, 64, 64)).astype(np.float32))
    found = apply(name, images)
    assert float(found.min()) >= 0 and float(found.max()) <= 255
    count = len(found.unique())
    assert count == 7 if name == "PosterizeIncreasing" else count > 2000
    if name == "ColorIncreasing":
        assert torch.equal(found, images)


def test_a_narrow_range_is_stretched_smoothly() -> None:
    """A 12-bit image in a 16-bit file has less than 16 of 255 levels."""
    images = torch.linspace(10.2, 10.9, 1024).view(1, 1, 32, 32)
    for name in ("AutoContrast", "Equalize"):
        found = apply(name, images).flatten()
        torch.testing.assert_close(found, torch.linspace(0, 255, 1024), atol=0.5, rtol=0)
        assert len(found.unique()) > 900
        constant = torch.full((2, 1, 8, 8), 7.25)
        assert torch.equal(apply(name, constant), constant)


def test_resizing_keeps_fractions_on_every_way() -> None:
    images = torch.from_numpy(np.random.default_rng(2).uniform(0, 255, (4, 40, 30, 1)))
    images = images.float()
    boxes = np.array([[0, 0, 40, 30], [3, 4, 20, 20], [5, 0, 16, 24], [0, 0, 16, 16]])
    flip = np.array([False, True, False, True])
    found = crop_and_resize(images, boxes, 16, flip)
    assert found.shape == (4, 1, 16, 16) and found.dtype == torch.float32
    assert float((found - found.round()).abs().mean()) > 0.2
    for other in (resize_one_by_one, resize_together):
        torch.testing.assert_close(other(images, boxes, 16, flip), found, atol=0.01, rtol=0)
    edges = torch.where(torch.rand(1, 20, 20, 1) > 0.5, 255.0, 0.0)
    sharp = crop_and_resize(edges, np.array([[0, 0, 20, 20]]), 48, np.array([False]))
    assert float(sharp.min()) == 0 and float(sharp.max()) == 255


@pytest.mark.parametrize("strong", [True, False])
def test_transforms_of_gray_images(strong: bool) -> None:
    numbers = {"mean": (0.5,), "std": (0.25,)}
    images = smooth(40).permute(0, 2, 3, 1).contiguous()
    transform = BatchTransform(image_size=24 if strong else 32, strong=strong, **numbers)
    inputs, _ = transform(images, epochs=[0] * 40, index=range(40))
    assert inputs.shape[1] == 1 and inputs.isfinite().all()
    others, _ = transform(images + 0.2, epochs=[0] * 40, index=range(40))
    same = (inputs == others).flatten(1).all(dim=1)
    assert int(same.sum()) <= 2  # posterised
    tested, _ = BatchTestTransform(image_size=32, **numbers)(images, epochs=[0], index=[0])
    torch.testing.assert_close(tested, (smooth(40) / 255 - 0.5) / 0.25)
    shown = to_pixels(tested, **numbers)
    assert shown.shape == (40, 32, 32, 3)
    assert torch.equal(shown[..., 2], smooth(40)[:, 0].to(torch.uint8))
