"""The strong recipe equals timm; the plain recipe and the test transform are recomputed here."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform

from lg.augment.recipe import TestTransform, TrainTransform
from lg.augment.view import View

MEAN = np.array([0.485, 0.456, 0.406])  # of ImageNet
STD = np.array([0.229, 0.224, 0.225])


def noise_image(
    height: int, width: int, seed: int = 0, low: int = 0, high: int = 256
) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(low, high, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def normalised(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(((np.asarray(image) / 255 - MEAN) / STD).transpose(2, 0, 1)).float()


def cubic_weights(size_in: int, size_out: int) -> np.ndarray:
    """Return [size_out, size_in]: Keys's kernel with a = -1/2, widened for downsampling."""
    scale = size_in / size_out
    centres = (np.arange(size_out) + 0.5) * scale - 0.5
    x = np.abs(np.arange(size_in) - centres[:, None]) / max(scale, 1)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 45), (64, 17)])
def test_the_test_transform_resizes_and_normalises_the_whole_image(height: int, width: int) -> None:
    # Medium brightness: otherwise the result depends on which axis Pillow resizes and clips first.
    image = noise_image(height, width, low=64, high=192)
    tensor, view = TestTransform(image_size=32)(image)
    assert view == View(0, 0, 1, 1, False)
    assert tensor.shape == (3, 32, 32) and tensor.dtype == torch.float32
    pixels = np.asarray(image).astype(float)
    pixels = np.einsum("xw,hwc->hxc", cubic_weights(width, 32), pixels)
    pixels = np.einsum("yh,hxc->yxc", cubic_weights(height, 32), pixels)
    found = tensor.numpy().transpose(1, 2, 0) * STD + MEAN
    assert np.abs(found * 255 - pixels).max() < (0.01 if height == width else 1.5)


def test_normalisation_by_hand() -> None:
    image = Image.new("RGB", (4, 4), (0, 255, 102))
    tensor, _ = TestTransform(image_size=4)(image)
    assert tensor[:, 1, 2].tolist() == pytest.approx(
        [-0.485 / 0.229, 0.544 / 0.224, (0.4 - 0.406) / 0.225], abs=1e-6
    )


def timm_parts(size: int):
    """Return timm's training transform without its first part, which crops and flips."""
    crop, *rest = create_transform(
        input_size=size,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        separate=True,
    )
    assert "RandomResizedCrop" in repr(crop) and "Flip" in repr(crop) and "Rand" in repr(rest)
    return rest


def test_after_the_crop_the_strong_recipe_equals_timm_bit_for_bit() -> None:
    size = 24
    ours = TrainTransform(image_size=size, strong=True)
    augment, finish = timm_parts(size)
    crops = []
    draw = ours.draw_view

    def keep_crop(image, size, *, hflip):
        crops.append(draw(image, size, hflip=hflip))
        kept.append((random.getstate(), np.random.get_state(), torch.get_rng_state()))
        return crops[-1]

    ours.draw_view = keep_crop  # type: ignore[method-assign]
    kept: list = []
    equal = plain = 0
    for number in range(120):
        seed(number)
        tensor, view = ours(noise_image(30, 40, number))
        image, drawn = crops[-1]
        assert view == drawn
        random.setstate(kept[-1][0])
        np.random.set_state(kept[-1][1])
        torch.set_rng_state(kept[-1][2])
        try:
            wanted = finish(augment(image))
        except ValueError as error:  # newer Pillow rejects 0 bits in posterize
            assert "bits" in str(error) or "posterize" in str(error).lower()
            continue
        assert torch.equal(tensor, wanted)
        equal += 1
        plain += torch.equal(tensor, normalised(image))
    assert equal > 110 and plain < 60


def test_the_strong_recipe_erases_a_quarter_of_the_images() -> None:
    transform = TrainTransform(image_size=16, strong=True)
    transform.finish = transform.finish.transforms[-1]  # only normalise and erase
    gray = Image.new("RGB", (16, 16), (128, 128, 128))
    seed(0)
    images = [transform(gray)[0] for _ in range(600)]
    erased = [bool((i != i[:, :1, :1]).any()) for i in images]
    assert 110 < sum(erased) < 190
    boxes = torch.stack([i for i, e in zip(images, erased, strict=True) if e])
    # Independent pixels with mean 0 and standard deviation 1, not one colour per box.
    changed = boxes[(boxes - normalised(gray)[:, :1, :1]).abs() > 1e-5]
    assert abs(changed.mean()) < 0.05 and abs(changed.std() - 1) < 0.05


def posterize_of(transform: TrainTransform):
    parts = [t for p in transform.finish.transforms for t in p.transforms]
    operations = [op for t in parts for op in getattr(t, "ops", ())]
    (operation,) = [op for op in operations if op.name.startswith("Posterize")]
    return operation


def test_posterize_supports_any_number_of_bits() -> None:
    operation = posterize_of(TrainTransform(image_size=8, strong=True))
    image = noise_image(8, 8)
    assert operation.level_fn(10, operation.hparams) == (0,)
    assert np.asarray(operation.aug_fn(image, 0)).max() == 0
    for bits in range(1, 8):
        wanted = ImageOps.posterize(image, bits)
        assert np.array_equal(operation.aug_fn(image, bits), wanted)
    assert np.array_equal(operation.aug_fn(image, 8), image)
    # As RandAugment calls it at magnitude 10, which means 0 bits.
    operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0
    assert np.asarray(operation(image)).max() == 0


def test_many_draws_of_the_strong_recipe_never_fail() -> None:
    transform = TrainTransform(image_size=8, strong=True)
    image = noise_image(9, 9)
    posterize_of(transform).magnitude = 12  # 0 bits in nearly all draws
    for number in range(300):
        seed(number)
        tensor, _ = transform(image)
        assert tensor.shape == (3, 8, 8) and bool(tensor.isfinite().all())


def test_the_plain_recipe_only_pads_with_black() -> None:
    transform = TrainTransform(image_size=32, strong=False, hflip=0.0)
    image = noise_image(32, 32)
    seed(0)
    tensor, view = transform(image)
    top, left = round(view.top * 32), round(view.left * 32)
    assert top != 0 and left != 0
    wanted = normalised(Image.new("RGB", (32, 32)))
    rows, columns = slice(max(-top, 0), 32 - max(top, 0)), slice(max(-left, 0), 32 - max(left, 0))
    source = normalised(image)[:, max(top, 0) : 32 + min(top, 0), max(left, 0) : 32 + min(left, 0)]
    wanted[:, rows, columns] = source
    assert torch.allclose(tensor, wanted, atol=1e-6)
    assert torch.allclose(tensor[:, 0 if top < 0 else -1, 5], torch.tensor(-MEAN / STD).float())


@pytest.mark.parametrize("strong", [True, False])
def test_a_seed_determines_a_training_image_even_after_pickling(strong: bool) -> None:
    transform = TrainTransform(image_size=16, strong=strong)
    copy = pickle.loads(pickle.dumps(transform))
    image = noise_image(20, 20)
    for number in range(10):
        seed(number)
        first, view = transform(image)
        seed(number)
        again, same_view = copy(image)
        assert torch.equal(first, again) and view == same_view
        seed(number + 1)
        assert not torch.equal(first, transform(image)[0])


@pytest.mark.parametrize("strong", [True, False])
def test_hflip_is_the_probability_of_a_flip(strong: bool) -> None:
    for hflip in (0.0, 1.0):
        transform = TrainTransform(image_size=8, strong=strong, hflip=hflip)
        assert {transform(noise_image(8, 8))[1].flip for _ in range(20)} == {bool(hflip)}
