"""Batched RandAugment: operations and draws equal those of timm on Pillow images."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.data import create_transform
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, rand_augment_transform

from lg.augment import randaugment as module
from lg.augment.operations import FILL, KINDS
from lg.augment.randaugment import OPERATIONS, UNIFORMS, Operations, randaugment

ENHANCE = (0.1, 0.19, 0.83, 1.0, 1.81, 1.9)
MOVE = (0.0, 0.9, -0.9123, 1.0, -1.0)  # fractions of the maximum
LEVELS: dict[str, tuple[float, ...]] = {
    "Rotate": tuple(30 * x for x in MOVE),
    "PosterizeIncreasing": (0, 1, 2, 3, 4, 8),
    "SolarizeIncreasing": (0, 26, 128, 255, 256),
    "SolarizeAdd": (0, 99, 110),
    "ColorIncreasing": ENHANCE,
    "ContrastIncreasing": ENHANCE,
    "BrightnessIncreasing": ENHANCE,
    "SharpnessIncreasing": ENHANCE,
    "ShearX": tuple(0.3 * x for x in MOVE),
    "ShearY": tuple(0.3 * x for x in MOVE),
    "TranslateXRel": tuple(0.45 * x for x in MOVE),
    "TranslateYRel": tuple(0.45 * x for x in MOVE),
}
WHOLE = ("PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd")
RESAMPLED = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def photographs(size: int) -> torch.Tensor:
    """Return [5, 3, S, S], uint8: a scene, a dark scene, two values, one value, noise."""
    rng = np.random.default_rng(size)
    y, x = np.mgrid[:size, :size] / size
    waves = np.stack([np.sin(5 * x + 2 * y), np.cos(4 * y), np.sin(6 * x * y)]) * 60 + 120
    waves += np.where((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.08, 70, 0) - 50 * (x + y > 1.5)
    scene = waves + rng.normal(0, 6, waves.shape)
    few = np.where(x > 0.5, 200, 40) + np.zeros((3, 1, 1))
    noise = rng.integers(0, 256, waves.shape)
    images = np.stack([scene, scene / 3 + 10, few, np.full_like(scene, 77), noise])
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8))


def fixed(name: str, level: float, count: int) -> Operations:
    return Operations(
        np.full((1, count), OPERATIONS.index(name)), np.full((1, count), float(level))
    )


def draw(count: int, *, rng: np.random.Generator, layers: int = 2, **options: float) -> Operations:
    return module.draw(rng.random((count, layers, UNIFORMS)), **options)


def by_timm(images: torch.Tensor, name: str, level: float) -> torch.Tensor:
    arguments = () if name not in LEVELS else (int(level) if name in WHOLE else level,)
    done = []
    for image in images.permute(0, 2, 3, 1).numpy():
        if name == "PosterizeIncreasing" and level == 0:  # rejected by newer Pillow
            done.append(np.zeros_like(image))
            continue
        options = {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BICUBIC}
        done.append(np.asarray(NAME_TO_OP[name](Image.fromarray(image), *arguments, **options)))
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2)


def timm_operations(size: int) -> list:
    recipe = create_transform(
        input_size=size,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
    )
    (augment,) = [t for t in recipe.transforms if hasattr(t, "ops")]
    assert augment.num_layers == 2 and augment.choice_weights is None
    return augment.ops


def test_operations_equal_those_of_the_recipe() -> None:
    operations = timm_operations(32)
    assert tuple(op.name for op in operations) == OPERATIONS
    for op in operations:
        assert op.kwargs == {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5)
    assert sorted(name for kind in KINDS for name in kind.names) == sorted(OPERATIONS)


@pytest.mark.parametrize("size", [96, 32, 9])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_equals_timm_on_pillow(name: str, size: int) -> None:
    images = photographs(size)
    for level in LEVELS.get(name, (0.0,)):
        ours = randaugment(images, fixed(name, level, len(images)))
        difference = (ours.int() - by_timm(images, name, level).int()).abs()
        if name in RESAMPLED:  # truncated float32 and double sometimes differ by one level
            assert difference.max() <= 1, level
            share = difference.float().mean((1, 2, 3))
            # With two values, sums are whole numbers, which Pillow's double may narrowly miss: here
            # in one column at most.
            assert (share < torch.tensor([0.01, 0.01, 1.01 / size, 0.01, 0.01])).all(), level
        else:
            assert difference.max() == 0, level


def test_a_batch_of_many_operations_applies_layers_in_order() -> None:
    images = photographs(32)
    rng = np.random.default_rng(1)
    images = images[torch.from_numpy(rng.integers(0, 5, 200))]
    draws = draw(200, rng=rng, probability=0.9)
    ours = randaugment(images, draws)
    wanted = []
    for n, image in enumerate(images):
        image = image[None]
        for operation, level in zip(draws.operation[:, n], draws.level[:, n], strict=True):
            if operation >= 0:
                image = by_timm(image, OPERATIONS[operation], level)
        wanted.append(image)
    difference = (ours.int() - torch.cat(wanted).int()).abs().float().flatten(1).mean(1)
    assert (difference == 0).float().mean() > 0.6
    # The next operation (equalise, posterise, solarise) may amplify a difference of one level.
    assert difference.mean() < 0.05


def sampled_from_timm(size: int, count: int) -> tuple[np.ndarray, list[list[float]]]:
    """Return how often timm applies each operation, [15 + 1] (the last: none), and its levels."""
    augment = rand_augment_transform(
        "rand-m9-mstd0.5-inc1",
        {
            "translate_const": int(size * 0.45),
            "img_mean": FILL,
            "interpolation": Image.Resampling.BICUBIC,
        },
    )
    applied, levels = np.zeros(len(OPERATIONS) + 1, int), [[] for _ in OPERATIONS]

    def record(number: int):
        def note(image, level=0.0, **_):
            applied[number] += 1
            levels[number].append(level)
            return image

        return note

    for number, op in enumerate(augment.ops):
        op.aug_fn = record(number)
    random.seed(0)
    np.random.seed(0)
    for _ in range(count):
        augment(None)
    applied[-1] = 2 * count - applied.sum()
    return applied, levels


def test_draws_have_the_distribution_of_timm() -> None:
    count = 40_000
    applied, levels = sampled_from_timm(224, count)
    draws = draw(count, rng=np.random.default_rng(0))
    assert draws.operation.shape == draws.level.shape == (2, count)
    assert draws.operation.dtype == np.int64 and draws.level.dtype == np.float64
    for layer in draws.operation:  # each layer, not only their sum
        ours = np.bincount(np.where(layer < 0, len(OPERATIONS), layer), minlength=16) / count
        theirs = applied / (2 * count)
        assert np.abs(ours - theirs)[:15].max() < 0.006  # 1/30 each
        assert abs(ours[15] - 0.5) < 0.01 and abs(theirs[15] - 0.5) < 0.01
    both = (draws.operation >= 0).all(0).mean()
    assert abs(both - 0.25) < 0.01  # independent
    assert (draws.level[draws.operation < 0] == 0).all()
    for number, name in enumerate(OPERATIONS):
        ours = draws.level[draws.operation == number]
        assert ks_2samp(ours, levels[number]).statistic < 0.05, name  # 0.038 is p = 0.01
        if name in WHOLE:
            assert (ours == ours.astype(int)).all()
            assert set(np.unique(ours)) <= set(range(257))
        quantiles = [0.02, 0.1, 0.25, 0.4, 0.6, 0.75, 0.9, 0.98]
        spread = np.ptp(levels[number]) + 1e-9
        # Half have each sign: these quantiles avoid the gap between the signs.
        distance = np.quantile(ours, quantiles) - np.quantile(levels[number], quantiles)
        if name != "PosterizeIncreasing":  # 0 or 1 bits
            assert np.abs(distance).max() < 0.05 * spread, name
        # The ends are rarely drawn and thus approximate; no draw exceeds the limits of timm.
        assert ours.min() == pytest.approx(min(levels[number]), abs=0.2 * spread)
        assert ours.max() == pytest.approx(max(levels[number]), abs=0.2 * spread)


@pytest.mark.parametrize("magnitude", [0, 3.7, 7.45, 9, 9.8, 10])
def test_levels_at_a_fixed_magnitude_equal_those_of_timm(magnitude: float) -> None:
    draws = draw(
        2000,
        rng=np.random.default_rng(0),
        magnitude=magnitude,
        spread=0,
        probability=1,
    )
    for number, name in enumerate(OPERATIONS):
        to_level = LEVEL_TO_ARG[name] or (lambda *_: (0,))
        theirs = {to_level(magnitude, {})[0] for _ in range(100)}  # both signs if there are two
        ours = np.unique(draws.level[draws.operation == number])
        assert ours == pytest.approx(np.unique(list(theirs)), rel=1e-12, abs=1e-12), name


@pytest.mark.parametrize("name", ["TranslateXRel", "TranslateYRel"])
@pytest.mark.parametrize("pixels", [0.5, -0.5, 1.5, 3, 31.5, 32, -33])
def test_pixels_on_the_edge_are_filled_as_in_pillow(name: str, pixels: float) -> None:
    images = photographs(32)
    ours = randaugment(images, fixed(name, pixels / 32, len(images)))
    difference = (ours.int() - by_timm(images, name, pixels / 32).int()).abs()
    assert difference.max() == 0


def test_arguments_of_draw() -> None:
    def rng() -> np.random.Generator:
        return np.random.default_rng(3)

    draws = draw(500, rng=rng(), magnitude=5, spread=0, layers=3, probability=1)
    assert draws.operation.shape == (3, 500) and draws.operation.min() == 0
    rotations = draws.level[draws.operation == OPERATIONS.index("Rotate")]
    assert set(rotations) == {-15.0, 15.0}
    assert set(draws.level[draws.operation == OPERATIONS.index("PosterizeIncreasing")]) == {2.0}
    assert (draw(50, rng=rng(), probability=0).operation == -1).all()
    clipped = draw(500, rng=rng(), magnitude=50, probability=1)
    assert np.abs(clipped.level[clipped.operation == 3]).max() == 30


def test_a_seed_fixes_the_draws() -> None:
    first, again, other = (draw(64, rng=np.random.default_rng(s)) for s in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.operation, other.operation)


def test_the_input_is_not_modified_and_no_operation_is_the_identity() -> None:
    images = photographs(16)
    kept = images.clone()
    none = Operations(np.full((2, 5), -1), np.zeros((2, 5)))
    same = randaugment(images, none)
    assert torch.equal(same, kept) and same.data_ptr() != images.data_ptr()
    for name in OPERATIONS:
        randaugment(images, fixed(name, LEVELS.get(name, (0, 0))[1], 5))
        assert torch.equal(images, kept), name


def test_a_sample_does_not_depend_on_its_batch() -> None:
    images = photographs(24).repeat(8, 1, 1, 1)
    draws = draw(40, rng=np.random.default_rng(2), probability=1)
    whole = randaugment(images, draws)
    for n in range(40):
        one = Operations(draws.operation[:, n : n + 1], draws.level[:, n : n + 1])
        assert torch.equal(randaugment(images[n : n + 1], one), whole[n : n + 1])
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(randaugment(strided, draws), whole)
    assert randaugment(images[:0], draw(0, rng=np.random.default_rng())).numel() == 0
