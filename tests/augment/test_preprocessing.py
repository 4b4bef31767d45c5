"""Squash, letterbox and crop: exact sides, the same picture on every way to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lg
from lg import builders, trainer
from lg.augment.batched import BatchTestTransform, BatchTransform, to_pixels
from lg.augment.preprocessing import make_square
from lg.config import load_trained_config
from lg.distributed import World
from lg.tools.predict import build_predictor

BASE = Path(__file__).parents[2] / "configs/digits/vit_digits_base.yaml"
MEAN = (124, 116, 104)


def stripes(width: int, height: int) -> Image.Image:
    """Return an image whose left third is red, the middle green and the right blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for third in range(3):
        pixels[:, third * width // 3 : (third + 1) * width // 3, third] = 255
    return Image.fromarray(pixels)


def test_letterbox_keeps_the_aspect_ratio_between_even_borders() -> None:
    pixels = np.array(make_square(stripes(90, 30), 60, "letterbox", MEAN))
    assert pixels.shape == (60, 60, 3)
    assert (pixels[:20] == MEAN).all() and (pixels[40:] == MEAN).all()
    assert (pixels[20:40] != MEAN).any(axis=2).all()
    assert pixels[30, [5, 30, 55]].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    pixels = np.array(make_square(stripes(30, 90), 60, "letterbox", MEAN))
    assert (pixels[:, :20] == MEAN).all() and (pixels[:, 40:] == MEAN).all()


def test_crop_shows_the_central_square() -> None:
    pixels = np.array(make_square(stripes(90, 30), 60, "crop", MEAN))
    inner = pixels[:, 4:-4]  # the bicubic filter rings at the border of two colours
    assert pixels.shape == (60, 60, 3) and (inner == (0, 255, 0)).all()


@pytest.mark.parametrize("rule", ["squash", "letterbox", "crop"])
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (7, 5), (2, 2)])
def test_any_image_becomes_square(rule: str, size: tuple[int, int]) -> None:
    assert make_square(Image.new("RGB", size), 32, rule, MEAN).size == (32, 32)
    for strong in (True, False):
        transform = BatchTransform(image_size=32, strong=strong, resize=rule)
        prepared = transform.prepare(Image.new("RGB", size))
        assert rule == "squash" or prepared.width == prepared.height
        images = torch.from_numpy(np.array(prepared))[None]
        assert transform(images, epochs=[0], index=[0])[0].shape == (1, 3, 32, 32)


def test_square_images_are_the_same_under_every_rule() -> None:
    image = stripes(48, 48)
    for strong in (True, False):
        results = [
            _apply(BatchTransform(image_size=32, strong=strong, resize=rule), image)
            for rule in ("squash", "letterbox", "crop")
        ]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_strong_crops_come_from_the_padded_square() -> None:
    transform = BatchTransform(image_size=32, strong=True, resize="letterbox")
    prepared = transform.prepare(stripes(100, 50))
    assert prepared.size == (100, 100)
    pixels = np.array(prepared)
    assert (pixels[:25] == MEAN).all() and (pixels[75:] == MEAN).all()
    assert transform.prepare(stripes(1000, 500)).size == (131, 131)  # 32 / sqrt(0.08 * 3/4)


def test_the_test_transform_equals_pillow() -> None:
    for rule in ("letterbox", "crop"):
        mine = _apply(BatchTestTransform(image_size=40, resize=rule), stripes(90, 30))
        wanted = np.array(make_square(stripes(90, 30), 40, rule, MEAN))
        assert np.array_equal(to_pixels(mine)[0].numpy(), wanted)


def _apply(transform: Any, image: Image.Image) -> torch.Tensor:
    images = torch.from_numpy(np.array(transform.prepare(image)))[None]
    return transform(images, epochs=[0], index=[3])[0]


@pytest.fixture(scope="module")
def oblong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images of several shapes."""
    root = tmp_path_factory.mktemp("oblong")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number, shape in enumerate(((20, 50, 3), (50, 20, 3), (30, 30, 3), (64, 40, 3))):
                pixels = random.integers(0, 256, shape).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def config(root: Path, *opts: str) -> Any:
    words = (
        f"TRAIN.DATASET image_folder TEST.DATASET image_folder DATA_LOADER.ROOT {root} "
        f"MODEL.NUM_CLASSES 2 TRANSFORMER.DEPTH 1 TRAIN.BATCH_SIZE 8 OPTIM.MAX_EPOCH 1 "
        f"OPTIM.WARMUP_EPOCHS 0 TRAIN.FRACTION 1.0 DEVICE cpu OUT_DIR {root}/run"
    )
    return lg.load_config(BASE, [*words.split(), *opts])


@pytest.mark.parametrize("strong", ["True", "False"])
def test_both_backends_make_the_same_batches(oblong: Path, strong: str) -> None:
    for rule in ("letterbox", "crop"):
        found = []
        for backend in ("workers", "device"):
            opts = ["TRAIN.RESIZE", rule, "TRAIN.STRONG_AUGMENTATION", strong]
            cfg = config(oblong, *opts, "DATA_LOADER.BACKEND", backend)
            data = builders.fetch_data(cfg, World())
            device = torch.device("cpu")
            loader = builders.build_train_loader(cfg, data.train, World(), device)
            loader.start(0, 0)
            tests = builders.build_test_loader(cfg, data.test, World(), device)
            found.append((next(loader).images, next(iter(tests)).images))
            loader.close()
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_tests_and_prediction_follow_the_rule(oblong: Path) -> None:
    trainer.train(config(oblong, "TRAIN.RESIZE", "letterbox"))
    weights = str(oblong / "run/model.pyth")
    opts = ["TEST.WEIGHTS", weights, "DEVICE", "cpu"]
    image = oblong / "test/a/0.png"
    rows = []
    for rule in ((), ("TEST.RESIZE", "crop")):
        cfg = load_trained_config(weights, [*opts, *rule])
        wanted = lg.evaluate(cfg).probabilities[0]
        found = build_predictor(cfg)(image)
        np.testing.assert_allclose(found.probabilities, wanted, atol=1e-6)
        rows.append(wanted)
    assert np.abs(rows[0] - rows[1]).max() > 1e-4
    assert builders.build_preprocessing(load_trained_config(weights, opts)).resize == "letterbox"
