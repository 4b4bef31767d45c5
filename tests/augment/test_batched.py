"""Batch transforms have the distributions of torchvision and timm and the pixels of Pillow."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import RandomResizedCrop

from lg.augment.batched import (
    BatchTestTransform,
    BatchTransform,
    draw_crops,
    draw_erased,
    erase,
    normalise,
    views,
)
from lg.augment.recipe import TestTransform
from lg.augment.resample import crop_and_resize, resize_together
from lg.augment.view import View, padding, shifted

COUNT = 20_000


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return an image with smooth colours, an edge and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(3, 20)) + np.cos(y / rng.uniform(3, 20)) for _ in range(3)]
    pixels = np.stack(waves, axis=2) * 50 + 128 + rng.normal(0, 8, (height, width, 3))
    pixels[x > 0.6 * width] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tensors(images: Sequence[Image.Image]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(image)) for image in images]


# --- Crops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("side", "size"), [(32, 48), (32, 20), (64, 224)])
def test_crops_equal_those_of_pillow(side: int, size: int, together: bool) -> None:
    images = [photograph(side, side, seed) for seed in range(12)]
    boxes = draw_crops(np.full(12, side), np.full(12, side), np.random.default_rng(1))
    flip = np.arange(12) % 2 == 0
    work = resize_together if together else crop_and_resize
    mine = work(torch.stack(tensors(images)), boxes, size, flip)
    assert mine.dtype == torch.uint8 and mine.shape == (12, 3, size, size)
    for image, (top, left, height, width), mirror, got in zip(
        images, boxes.tolist(), flip, mine, strict=True
    ):
        crop = image.crop((left, top, left + width, top + height)).resize((size, size), 3)
        wanted = np.array(ImageOps.mirror(crop) if mirror else crop).transpose(2, 0, 1)
        difference = np.abs(got.numpy().astype(int) - wanted)
        # Versions of Pillow differ in which direction is resized and rounded first.
        assert difference.max() <= 2 and difference.mean() < 0.3


def test_images_of_many_sizes_in_a_batch() -> None:
    images = [photograph(90, 140), photograph(300, 61, 1)]
    whole = np.array([[0, 0, 90, 140], [0, 0, 300, 61]])
    mine = crop_and_resize(tensors(images), whole, 56, np.zeros(2, bool))
    for image, got in zip(images, mine, strict=True):
        wanted = np.array(image.resize((56, 56), 3)).transpose(2, 0, 1).astype(int)
        assert np.abs(got.numpy() - wanted).mean() < 0.3


@pytest.mark.parametrize(("height", "width"), [(32, 32), (375, 500), (40, 300)])
def test_boxes_have_the_distribution_of_torchvision(height: int, width: int) -> None:
    sizes = np.full(COUNT, height), np.full(COUNT, width)
    mine = draw_crops(*sizes, np.random.default_rng(0)).astype(float)
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    theirs = np.array(
        [
            RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            for _ in range(COUNT // 4)
        ],
        dtype=float,
    )
    assert (mine[:, :2] >= 0).all() and (mine[:, 2:] >= 1).all()
    assert (mine[:, 0] + mine[:, 2] <= height).all() and (mine[:, 1] + mine[:, 3] <= width).all()
    for measure in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
    ):
        assert ks_2samp(measure(mine), measure(theirs)).statistic < 0.03


def test_the_fallback_for_elongated_images_is_the_centre() -> None:
    boxes = draw_crops(np.array([10, 400]), np.array([400, 10]), np.random.default_rng(0))
    assert boxes.tolist() == [[0, 193, 10, 13], [193, 0, 13, 10]]


# --- Erasing -----------------------------------------------------------------------------------


def test_erased_boxes_have_the_distribution_of_timm() -> None:
    size = 40
    mine = draw_erased(COUNT, size, np.random.default_rng(0))
    random.seed(0)
    torch.manual_seed(0)
    eraser = RandomErasing(0.25, mode="const", device="cpu")
    theirs = []
    for _ in range(COUNT // 2):
        erased = (eraser(torch.ones(1, size, size)) == 0)[0]
        rows, columns = erased.any(dim=1), erased.any(dim=0)
        first = [int(x.int().argmax()) for x in (rows, columns)]
        theirs.append([*first, int(rows.sum()), int(columns.sum())])
    theirs = np.array(theirs)
    kept, shown = mine[mine[:, 2] > 0], theirs[theirs[:, 2] > 0]
    assert len(kept) / len(mine) == pytest.approx(len(shown) / len(theirs), abs=0.01)
    for column in range(4):
        assert ks_2samp(kept[:, column], shown[:, column]).statistic < 0.04
    assert ks_2samp(kept[:, 2] * kept[:, 3], shown[:, 2] * shown[:, 3]).statistic < 0.04
    assert (kept[:, 0] + kept[:, 2] <= size).all() and (kept[:, 1] + kept[:, 3] <= size).all()


def test_only_boxes_are_filled_with_normal_noise() -> None:
    images = torch.full((3, 3, 50, 50), 7.0)
    boxes = np.array([[5, 10, 30, 40], [0, 0, 0, 0], [49, 0, 1, 50]])
    filled = erase(images.clone(), boxes, seed=3)
    changed = (filled != 7).all(dim=1)
    assert changed[0, 5:35, 10:50].all() and int(changed[0].sum()) == 1200
    assert not changed[1].any() and int(changed[2].sum()) == 50
    noise = filled[0, :, 5:35, 10:50]
    assert abs(float(noise.mean())) < 0.06 and abs(float(noise.std()) - 1) < 0.05
    assert torch.equal(filled, erase(images.clone(), boxes, seed=3))
    assert not torch.equal(filled, erase(images.clone(), boxes, seed=4))


# --- Whole transforms --------------------------------------------------------------------------


def test_the_test_transform_equals_that_of_single_images() -> None:
    transform, single = BatchTestTransform(image_size=32), TestTransform(image_size=32)
    for sizes in ([(32, 32), (32, 32)], [(20, 20), (45, 20)], [(120, 80), (33, 33)]):
        images = [photograph(*size, seed) for seed, size in enumerate(sizes)]
        kept = tensors([transform.prepare(image) for image in images])
        mine = transform.apply(kept)
        wanted = torch.stack([single(image)[0] for image in images])
        assert mine.dtype == torch.float32
        assert float((mine - wanted).abs().mean()) < 5e-3


def test_the_plain_transform_shifts_over_black_and_flips() -> None:
    transform = BatchTransform(image_size=24, strong=False)
    images = [photograph(40, 30, seed) for seed in range(50)]
    kept = torch.stack(tensors([transform.prepare(image) for image in images]))
    size = np.full(50, 24)
    draws = transform.draw(size, size, np.random.default_rng(0))
    mine = transform.apply(kept, draws)
    whole = torch.stack([TestTransform(image_size=24)(image)[0] for image in images])
    drawn = views(draws, size, size)
    wanted = [shifted(whole[[i]], View._make(v))[0] for i, v in enumerate(drawn.tolist())]
    torch.testing.assert_close(mine, torch.stack(wanted))
    most = padding(24)
    many = transform.draw(np.full(COUNT, 24), np.full(COUNT, 24), np.random.default_rng(1))
    values, counts = np.unique(many.box[:, 0], return_counts=True)
    assert values.tolist() == list(range(-most, most + 1))
    assert counts.min() > 0.9 * COUNT / len(values)
    assert many.flip.mean() == pytest.approx(0.5, abs=0.015)


def test_the_strong_transform_applies_its_draws_in_order() -> None:
    transform = BatchTransform(image_size=32, strong=True, hflip=0.3)
    images = torch.stack(tensors([photograph(48, 48, seed) for seed in range(64)]))
    size = np.full(64, 48)
    draws = transform.draw(size, size, np.random.default_rng(5))
    mine = transform.apply(images, draws)
    assert mine.shape == (64, 3, 32, 32) and mine.dtype == torch.float32
    assert torch.equal(mine, transform.apply(images, draws))
    crops = normalise(crop_and_resize(images, draws.box, 32, draws.flip))
    assert draws.operations is not None
    untouched = (draws.operations.operation < 0).all(axis=0)
    untouched_rows = np.flatnonzero(untouched & (draws.erased[:, 2] == 0))
    assert len(untouched_rows) > 5
    assert torch.equal(mine[untouched_rows], crops[untouched_rows])
    only_erased = np.flatnonzero(untouched & (draws.erased[:, 2] > 0))
    assert len(only_erased) > 0
    for row in only_erased:
        top, left, height, width = draws.erased[row]
        changed = (mine[row] != crops[row]).all(dim=0)
        assert int(changed.sum()) == height * width
        assert changed[top : top + height, left : left + width].all()
    operated = np.flatnonzero((draws.operations.operation >= 0).any(axis=0))
    assert float((mine[operated] - crops[operated]).abs().mean()) > 0.1


def test_views_are_boxes_in_fractions() -> None:
    transform = BatchTransform(image_size=32, strong=True)
    heights, widths = np.array([50, 60, 32]), np.array([70, 40, 32])
    draws = transform.draw(heights, widths, np.random.default_rng(0))
    found = views(draws, heights, widths)
    for row in range(3):
        top, left, height, width = draws.box[row] / np.array(
            [heights[row], widths[row], heights[row], widths[row]]
        )
        wanted = [top, left, height, width, float(draws.flip[row])]
        torch.testing.assert_close(found[row], torch.tensor(wanted, dtype=torch.float32))


def test_large_images_are_cached_without_loss_for_any_crop() -> None:
    transform = BatchTransform(image_size=50, strong=True)
    assert transform.prepare(photograph(150, 250)).size == (250, 150)
    cached = transform.prepare(photograph(600, 400))
    assert cached.width / cached.height == pytest.approx(2 / 3, rel=0.01)
    boxes = draw_crops(
        np.full(COUNT, cached.height), np.full(COUNT, cached.width), np.random.default_rng(0)
    )
    assert boxes[:, 2:].min() >= 49  # the smallest crop is as large as the result
    assert boxes[:, 2:].min() <= 53
