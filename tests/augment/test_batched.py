"""Batch transforms have the distributions of torchvision and timm and the pixels of Pillow."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import RandomResizedCrop

from lg.augment import draws as draws_module
from lg.augment.batched import (
    BatchTestTransform,
    BatchTransform,
    erase,
    erase_together,
    noise_images,
    normalise,
)
from lg.augment.draws import CROP_UNIFORMS, ERASE_UNIFORMS, Draws, uniforms
from lg.augment.randaugment import OPERATIONS
from lg.augment.resample import crop_and_resize, resize_one_by_one, resize_together
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


def draw_crops(heights: np.ndarray, widths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return draws_module.draw_crops(heights, widths, rng.random((len(heights), CROP_UNIFORMS)))


def draw_erased(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    return draws_module.draw_erased(size, rng.random((count, ERASE_UNIFORMS)))


def numbers(seed: int, epoch: int, index: Sequence[int]) -> np.ndarray:
    return uniforms(seed, [epoch] * len(index), index)


def draw(transform: BatchTransform, heights: np.ndarray, widths: np.ndarray) -> Draws:
    return transform.draw(heights, widths, numbers(transform.seed, 0, range(len(heights))))


def whole_images(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """Return images [N, 3, S, S] resized by Pillow and normalised."""
    resized = torch.stack(tensors([image.resize((size, size), 3) for image in images]))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return ((resized / 255 - mean) / std).permute(0, 3, 1, 2)


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


def test_on_gpus_images_of_many_sizes_are_resized_alike() -> None:
    images = tensors([photograph(40 + n, 60 - n, n) for n in range(6)])
    boxes = np.array([[n, 2 * n, 20 + n, 24] for n in range(6)])
    boxes[3] = [1, 2, 20, 20]  # needs no resize
    flip = np.arange(6) % 2 == 0
    mine = resize_one_by_one(images, boxes, 20, flip)
    wanted = crop_and_resize(images, boxes, 20, flip)
    assert mine.dtype == torch.uint8 and (mine.int() - wanted.int()).abs().max() <= 1
    assert torch.equal(mine[3], wanted[3])


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
    filled = erase(images.clone(), boxes, np.array([0.1, 0.2, 0.3]))
    changed = (filled != 7).all(dim=1)
    assert changed[0, 5:35, 10:50].all() and int(changed[0].sum()) == 1200
    assert not changed[1].any() and int(changed[2].sum()) == 50
    noise = filled[0, :, 5:35, 10:50]
    assert abs(float(noise.mean())) < 0.06 and abs(float(noise.std()) - 1) < 0.05
    others = erase(images.clone(), boxes, np.array([0.4, 0.2, 0.3]))
    assert (filled[0] != others[0]).sum() == 3 * 1200 and torch.equal(filled[1:], others[1:])


def test_noise_does_not_depend_on_the_batch() -> None:
    boxes = np.array([[5, 10, 20, 12], [1, 2, 3, 4], [0, 0, 30, 31], [3, 1, 9, 9]])
    numbers = np.array([0.0, 0.25, 0.5, 1 - 2**-53])
    together = erase(torch.zeros(4, 3, 32, 32), boxes, numbers)
    for n in range(4):
        alone = erase(torch.zeros(1, 3, 32, 32), boxes[[n]], numbers[[n]])
        assert torch.equal(alone[0], together[n])


def test_on_gpus_the_same_pixels_are_erased() -> None:
    rng, choices = np.random.default_rng(0), noise_images(24, torch.device("cpu"))
    boxes = draw_erased(64, 24, rng)
    number = rng.integers(2**20, size=64)
    images = torch.randn(64, 3, 24, 24)
    together = erase_together(images, boxes, choices, number)
    assert torch.equal(together, erase(images.clone(), boxes, number / 2**20))
    assert not torch.equal(together, images)


def test_noise_is_normal_and_independent() -> None:
    values = noise_images(64, torch.device("cpu"))
    assert values.shape == (2**20, 3, 64, 64)
    sample = values[[0, 500_000, 2**20 - 1]].double()
    flat = sample.flatten(1).numpy()
    assert ks_2samp(flat.ravel(), np.random.default_rng(0).standard_normal(200_000)).pvalue > 0.001
    assert np.abs(np.corrcoef(flat) - np.eye(3)).max() < 0.03
    assert np.abs(np.corrcoef(sample[0].flatten(1).numpy()) - np.eye(3)).max() < 0.06  # channels
    right, below = ((sample * sample.roll(1, dims=d)).mean() for d in (3, 2))
    assert abs(float(right)) < 0.02 and abs(float(below)) < 0.02


# --- Draws -------------------------------------------------------------------------------------


def test_numbers_depend_on_seed_epoch_and_index_alone() -> None:
    rows = numbers(7, 3, [5, 9, 2])
    assert rows.shape[0] == 3 and rows.min() > 0 and rows.max() < 1
    assert np.array_equal(numbers(7, 3, [2, 5]), rows[[2, 0]])
    others = [rows[1], *(numbers(*key)[0] for key in ((8, 3, [9]), (7, 4, [9]), (7, 3, [10])))]
    assert len(np.unique(np.concatenate(others))) == 4 * rows.shape[1]
    # Epoch and index are not interchangeable, and large values do not wrap around.
    for key in ((7, 9, [3]), (7 + 2**32, 3, [9]), (7, 3, [9 + 2**32])):
        assert not np.isin(numbers(*key), rows).any()


def test_numbers_are_uniform_and_independent() -> None:
    rows = numbers(1, 0, range(COUNT))
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded with probability 0.001.
    levels = (np.arange(COUNT) + 0.5) / COUNT
    assert np.abs(np.sort(rows, axis=0) - levels[:, None]).max() < 2.4 / np.sqrt(COUNT)
    correlation = np.corrcoef(rows.T) - np.eye(rows.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(COUNT)
    for later in (rows[1:], numbers(1, 1, range(COUNT - 1))):  # next image, next epoch
        pairs = [np.corrcoef(a, b)[0, 1] for a, b in zip(rows[:-1].T, later.T, strict=True)]
        assert np.abs(pairs).max() < 5 / np.sqrt(COUNT)


# --- Whole transforms --------------------------------------------------------------------------


def test_the_test_transform_resizes_and_normalises_the_whole_image() -> None:
    transform = BatchTestTransform(image_size=32)
    for sizes in ([(32, 32), (32, 32)], [(20, 20), (45, 20)], [(120, 80), (33, 33)], [(32, 32)]):
        images = [photograph(*size, seed) for seed, size in enumerate(sizes)]
        kept = tensors([transform.prepare(image) for image in images])
        mine, view = transform(kept, epochs=[0] * len(sizes), index=range(len(sizes)))
        wanted = whole_images(images, 32)
        assert mine.dtype == torch.float32 and mine.is_contiguous()
        assert view.tolist() == [[0, 0, 1, 1, 0]] * len(sizes)
        assert float((mine - wanted).abs().mean()) < 5e-3
        if all(size == (32, 32) for size in sizes):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


def test_normalisation_by_hand() -> None:
    pixels = torch.tensor([0, 255, 102], dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalise(pixels).flatten().tolist() == pytest.approx(
        [-0.485 / 0.229, 0.544 / 0.224, (0.4 - 0.406) / 0.225], abs=1e-6
    )


def test_the_plain_transform_shifts_over_black_and_flips() -> None:
    transform = BatchTransform(image_size=24, strong=False)
    images = [photograph(40, 30, seed) for seed in range(50)]
    kept = torch.stack(tensors([transform.prepare(image) for image in images]))
    size = np.full(50, 24)
    draws = draw(transform, size, size)
    mine = transform.apply(kept, draws)
    whole = whole_images(images, 24)
    drawn = draws.views(size, size)
    wanted = [shifted(whole[[i]], View._make(v))[0] for i, v in enumerate(drawn.tolist())]
    torch.testing.assert_close(mine, torch.stack(wanted))
    most = padding(24)
    many = draw(transform, np.full(COUNT, 24), np.full(COUNT, 24))
    values, counts = np.unique(many.box[:, 0], return_counts=True)
    assert values.tolist() == list(range(-most, most + 1))
    assert counts.min() > 0.9 * COUNT / len(values)
    assert many.flip.mean() == pytest.approx(0.5, abs=0.015)


def test_the_strong_transform_applies_its_draws_in_order() -> None:
    transform = BatchTransform(image_size=32, strong=True, hflip=0.3)
    images = torch.stack(tensors([photograph(48, 48, seed) for seed in range(64)]))
    size = np.full(64, 48)
    draws = draw(transform, size, size)
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
    draws = draw(transform, heights, widths)
    found = draws.views(heights, widths)
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


@pytest.mark.parametrize("strong", [True, False])
def test_hflip_is_the_probability_of_a_flip(strong: bool) -> None:
    for hflip, low, high in ((0.0, 0, 0), (1.0, 1, 1), (0.25, 0.235, 0.265)):
        transform = BatchTransform(image_size=32, strong=strong, hflip=hflip)
        size = np.full(COUNT, 32)
        assert low <= draw(transform, size, size).flip.mean() <= high


def test_the_strong_transform_equals_timm_and_pillow_image_by_image() -> None:
    size, count = 32, 150
    transform = BatchTransform(image_size=size, strong=True, seed=2)
    images = [photograph(40, 48, seed) for seed in range(count)]
    mine, views = transform(torch.stack(tensors(images)), epochs=[1] * count, index=range(count))
    draws = transform.draw(np.full(count, 40), np.full(count, 48), numbers(2, 1, range(count)))
    assert draws.operations is not None
    options = {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BICUBIC}
    differences = []
    for n, image in enumerate(images):
        top, left, height, width, flip = views[n].tolist()
        y, x, high, wide = (round(v) for v in (40 * top, 48 * left, 40 * height, 48 * width))
        crop = image.crop((x, y, x + wide, y + high)).resize((size, size), 3)
        crop = ImageOps.mirror(crop) if flip else crop
        for operation, level in zip(*(layer[:, n] for layer in draws.operations), strict=True):
            name = OPERATIONS[operation]
            if operation < 0 or (name == "PosterizeIncreasing" and level == 0):
                continue  # newer versions of Pillow reject 0 bits
            whole = name.startswith(("Posterize", "Solarize"))
            arguments = [int(level) if whole else level] if LEVEL_TO_ARG[name] else []
            crop = NAME_TO_OP[name](crop, *arguments, **options)
        difference = (mine[n] - whole_images([crop], size)[0]).abs() * 0.225 * 255
        top, left, height, width = draws.erased[n]
        difference[:, top : top + height, left : left + width] = 0
        differences.append(float(difference.mean()))
    # Pillow resizes to within one level, which equalising and posterising may amplify.
    assert np.median(differences) < 0.1 and np.mean(np.array(differences) < 1) > 0.9


def test_a_resized_crop_shows_its_view() -> None:
    height, width, size, count, step = 50, 40, 64, 60, 5
    pixels = np.zeros((height, width, 3), np.uint8)  # colours identify positions
    pixels[..., 0], pixels[..., 1] = step * np.arange(height)[:, None], step * np.arange(width)
    heights, widths = np.full(count, height), np.full(count, width)
    draws = draw(BatchTransform(image_size=size, strong=True), heights, widths)
    image = torch.from_numpy(pixels)
    crops = crop_and_resize(image.expand(count, -1, -1, -1), draws.box, size, draws.flip)
    centres = (np.arange(size) + 0.5) / size
    inside = slice(size // 4, -size // 4)  # away from the border, where neighbours are missing
    for shown, (top, left, high, wide, flip) in zip(
        crops.numpy(), draws.views(heights, widths).tolist(), strict=True
    ):
        shown = (shown[..., ::-1] if flip else shown)[:, inside, inside].astype(float)
        rows = height * (top + high * centres[inside]) - 0.5
        columns = width * (left + wide * centres[inside]) - 0.5
        assert np.abs(shown[0] - step * rows[:, None]).max() < 1
        assert np.abs(shown[1] - step * columns).max() < 1
