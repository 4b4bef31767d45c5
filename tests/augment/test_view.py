"""Views describe crops and flips exactly."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from lg.augment.view import View, padded_crop, random_resized_crop

STEP = 5  # levels of red per row, and of green per column


def gradient(height: int, width: int) -> Image.Image:
    """Return an image with red STEP x row and green STEP x column: colours identify positions."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = STEP * np.arange(height)[:, None]
    pixels[..., 1] = STEP * np.arange(width)
    return Image.fromarray(pixels)


def seed(number: int) -> None:
    random.seed(number)
    torch.manual_seed(number)


def test_view_as_a_tensor() -> None:
    assert View().tensor().tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    tensor = View(0.25, -0.125, 0.5, 0.75, True).tensor()
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == [0.25, -0.125, 0.5, 0.75, 1.0]


def test_a_resized_crop_matches_its_view() -> None:
    height, width, size = 50, 40, 64
    flips = 0
    for number in range(60):
        seed(number)
        image, view = random_resized_crop(gradient(height, width), size, hflip=0.5)
        assert image.size == (size, size)
        pixels = np.asarray(image).astype(float)
        if view.flip:
            flips += 1
            pixels = pixels[:, ::-1]
        centres = (np.arange(size) + 0.5) / size
        rows = height * (view.top + view.height * centres) - 0.5
        columns = width * (view.left + view.width * centres) - 0.5
        inside = slice(size // 4, -size // 4)  # away from the border, where neighbours are missing
        assert np.abs(pixels[inside, inside, 0] - STEP * rows[inside, None]).max() < 1
        assert np.abs(pixels[inside, inside, 1] - STEP * columns[inside]).max() < 1
    assert 15 < flips < 45


def test_resized_crops_are_inside_the_image_on_whole_pixels() -> None:
    height, width = 47, 31
    areas = []
    for number in range(300):
        seed(number)
        _, view = random_resized_crop(gradient(height, width), 8, hflip=0.5)
        top, left, high, wide = np.array(view[:4]) * [height, width, height, width]
        box = np.array([top, left, high, wide])
        assert np.abs(box - box.round()).max() < 1e-9
        assert top >= 0 and left >= 0 and high >= 1 and wide >= 1
        assert top + high <= height + 1e-9 and left + wide <= width + 1e-9
        # 3/4 to 4/3, up to rounding to whole pixels
        assert 3 / 4 - 0.15 < wide / high < 4 / 3 + 0.15
        areas.append(view.height * view.width)
    assert 0.06 < min(areas) < 0.12 and max(areas) > 0.85


def test_resized_crops_have_the_distribution_of_timm() -> None:
    image, draws = gradient(40, 48), 3000
    ours, theirs = [], []
    random.seed(0)
    torch.manual_seed(0)
    for _ in range(draws):
        _, view = random_resized_crop(image, 1, hflip=0.5)
        ours.append(np.array(view[:4]) * [40, 48, 40, 48])
        theirs.append(
            RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        )
    for column, name in enumerate(("top", "left", "height", "width")):
        a = np.sort(np.array(ours)[:, column].round())
        b = np.sort(np.array(theirs)[:, column])
        levels = np.arange(49)
        distance = np.abs(
            np.searchsorted(a, levels, "right") - np.searchsorted(b, levels, "right")
        ).max()
        # Kolmogorov-Smirnov, two samples: 1.95 sqrt(2 / n) is exceeded with probability 0.001.
        assert distance / draws < 1.95 * np.sqrt(2 / draws), name


@pytest.mark.parametrize("crop", [random_resized_crop, padded_crop])
def test_the_probability_of_a_flip(crop) -> None:
    image = gradient(16, 16)
    for probability, low, high in ((0.0, 0, 0), (1.0, 400, 400), (0.25, 65, 135)):
        seed(1)
        flips = sum(crop(image, 16, hflip=probability)[1].flip for _ in range(400))
        assert low <= flips <= high


def test_a_padded_crop_is_the_image_shifted_over_black() -> None:
    size, padding = 32, 4
    source = np.asarray(gradient(size, size)).copy()
    source[..., 2] = 200  # so that only padding is black
    for number in range(40):
        seed(number)
        image, view = padded_crop(Image.fromarray(source), size, hflip=0.5)
        assert (view.height, view.width) == (1.0, 1.0)
        top, left = round(view.top * size), round(view.left * size)
        assert (top / size, left / size) == (view.top, view.left)
        canvas = np.zeros((size + 2 * padding, size + 2 * padding, 3), np.uint8)
        canvas[padding:-padding, padding:-padding] = source
        wanted = canvas[padding + top :, padding + left :][:size, :size]
        pixels = np.asarray(image)
        assert np.array_equal(pixels[:, ::-1] if view.flip else pixels, wanted)


def test_the_offsets_of_padded_crops_are_uniform() -> None:
    image, draws = Image.new("RGB", (24, 24)), 4900
    seed(2)
    counts = Counter(padded_crop(image, 24, hflip=0.5)[1] for _ in range(draws))
    offsets = Counter[tuple[int, int]]()
    for view, count in counts.items():
        offsets[round(view.top * 24), round(view.left * 24)] += count
    assert set(offsets) == {(y, x) for y in range(-3, 4) for x in range(-3, 4)}
    expected = draws / 49
    chi_square = sum((n - expected) ** 2 / expected for n in offsets.values())
    assert chi_square < 84  # 48 degrees of freedom: exceeded with probability 0.001


def test_a_padded_crop_resizes_first() -> None:
    seed(3)
    image, view = padded_crop(gradient(20, 50), 40, hflip=0.0)
    pixels = np.asarray(image).astype(float)
    rows = 20 * (view.top + (np.arange(40) + 0.5) / 40) - 0.5
    columns = 50 * (view.left + (np.arange(40) + 0.5) / 40) - 0.5
    assert np.abs(pixels[12:28, 12:28, 0] - STEP * rows[12:28, None]).max() < 1
    assert np.abs(pixels[12:28, 12:28, 1] - STEP * columns[12:28]).max() < 1
