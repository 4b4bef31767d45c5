"""Gray images keep 16 bits from the file to the model, in training, tests and prediction."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lg
from lg import builders, trainer
from lg.augment.preprocessing import Preprocessing
from lg.config import load_trained_config
from lg.datasets.image import PixelFormat, pixel_tensor, to_gray
from lg.datasets.scan import inspect_image
from lg.distributed import World
from lg.errors import CheckpointError, ConfigError, DataError
from lg.tools.export import _check_batch, export
from lg.tools.predict import build_predictor
from lg.tools.report import mistakes
from lg.tools.report.runs import read_runs
from lg.tools.report.subject import test_runs as evaluate_runs

CONFIGS = Path(__file__).parents[2] / "configs"
GUIDE, GUIDED = CONFIGS / "digits/r-8_digits.yaml", CONFIGS / "digits/vit_digits_ours.yaml"
GRAY = PixelFormat(channels=1)
WINDOW = ("DATA_LOADER.WINDOW", [29_500, 30_500])


def values(image: Image.Image) -> list[float]:
    assert image.mode == "F"
    return np.asarray(image).ravel().tolist()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_are_kept(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 1, 128, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a{suffix}")
    found = values(GRAY.open(tmp_path / f"a{suffix}"))
    assert found == pytest.approx((levels[0] / 257).tolist(), rel=1e-6)
    assert np.array_equal(np.round(np.array(found) * 257), levels[0])


def test_other_modes_become_gray(tmp_path: Path) -> None:
    levels = np.array([[0, 51, 255]], dtype=np.uint8)
    gray = Image.fromarray(levels)
    assert values(to_gray(gray)) == values(to_gray(gray.convert("RGB"))) == [0, 51, 255]
    assert values(to_gray(Image.fromarray(levels > 100))) == [0, 0, 255]
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    assert values(to_gray(red)) == [76]  # 0.299 * 255
    clear = Image.fromarray(np.array([[[9, 0], [9, 255]]], dtype=np.uint8))  # LA, over white
    assert values(to_gray(clear)) == [255, 9]
    exif = Image.Exif()
    exif[0x112] = 6  # rotated by 90 degrees
    gray.save(tmp_path / "a.png", exif=exif)
    assert GRAY.open(tmp_path / "a.png").size == (1, 3)
    assert GRAY.open(tmp_path / "a.png").info == {"mode": "L"}


def test_windows_map_the_numbers_of_the_file(tmp_path: Path) -> None:
    """Hounsfield units of a CT slice, for example."""
    numbers = np.array([[-1024, -160, 40, 240, 3000]], dtype=np.int32)
    window = PixelFormat(1, (-160.0, 240.0))
    for pixels in (numbers, numbers.astype(np.float32)):
        Image.fromarray(pixels).save(tmp_path / "ct.tif")
        assert values(window.open(tmp_path / "ct.tif")) == [0, 0, 127.5, 255, 255]
        with pytest.raises(DataError, match=r"ct\.tif: .*-1024 to 3000; set DATA_LOADER\.WINDOW"):
            GRAY.open(tmp_path / "ct.tif")
    twelve = np.array([[0, 1024, 4095]], dtype=np.uint16)
    Image.fromarray(twelve).save(tmp_path / "12.png")
    assert values(PixelFormat(1, (0, 4095)).open(tmp_path / "12.png")) == pytest.approx(
        [0, 1024 / 4095 * 255, 255]
    )
    with pytest.raises(DataError, match="not a finite number"):
        window.convert(Image.fromarray(np.array([[np.nan]], dtype=np.float32)))


def write_folder(root: Path) -> None:
    """Write 16-bit images of two classes: waves along rows and along columns, of little contrast,
    which 8 bits cannot hold."""
    rng = np.random.default_rng(0)
    along = np.sin(np.arange(24) / 2)
    for split, count in (("train", 24), ("test", 12)):
        for name, waves in (("down", along[:, None]), ("across", along[None, :])):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = 30_000 + 100 * waves + rng.normal(0, 10, (24, 24)) + np.zeros((24, 24))
                image = Image.fromarray(pixels.astype(np.uint16))
                image.save(root / split / name / f"{number}.png")


@pytest.fixture(name="root", scope="module")
def root_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gray")
    write_folder(root / "data")
    return root


def config(path: Path, root: Path, *opts: Any) -> Any:
    words = (
        f"TRAIN.DATASET image_folder TEST.DATASET image_folder DATA_LOADER.ROOT {root}/data "
        f"MODEL.NUM_CLASSES 2 MODEL.IN_CHANNELS 1 DATA_LOADER.NORMALIZE auto TRAIN.FRACTION 1.0 "
        f"TRAIN.BATCH_SIZE 16 OPTIM.WARMUP_EPOCHS 0 OPTIM.MAX_EPOCH 4 TEST.PERIOD 4 DEVICE cpu "
        f"DATA_LOADER.NUM_WORKERS 1 OUT_DIR {root}/{path.stem}"
    )
    return lg.load_config(path, [*words.split(), *map(str, opts)])


@pytest.fixture(name="guide", scope="module")
def guide_fixture(root: Path) -> Path:
    trainer.train(config(GUIDE, root, *WINDOW, "TRAIN.BATCH_SIZE", 8, "OPTIM.MAX_EPOCH", 12))
    return root / "r-8_digits/model.pyth"


@pytest.mark.parametrize("backend", ["workers", "device"])
@pytest.mark.parametrize("strong", [True, False])
def test_differences_below_a_level_of_8_bits_reach_the_model(
    tmp_path: Path, backend: str, strong: bool
) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
    ramp = np.linspace(20_000, 40_000, 20 * 20).reshape(20, 20)
    found = []
    opts = ("TRAIN.STRONG_AUGMENTATION", strong, "DATA_LOADER.BACKEND", backend)
    opts += ("TRAIN.BATCH_SIZE", 2, "DATA_LOADER.NORMALIZE", "imagenet")
    for step in (0, 40):  # of 65535: 0.16 levels of 8 bits
        image = Image.fromarray((ramp + step).astype(np.uint16))
        for split in ("train", "test"):
            for name in ("a", "b"):
                image.save(tmp_path / "data" / split / name / "0.png")
        cfg = config(GUIDE, tmp_path, *opts)
        data, device = builders.fetch_data(cfg, World()), torch.device("cpu")
        loader = builders.build_train_loader(cfg, data.train, World(), device)
        loader.start(0, 0)
        tests = builders.build_test_loader(cfg, data.test, World(), device)
        found.append((next(loader).images, next(iter(tests)).images))
        loader.close()
    (train, test), (train_2, test_2) = found
    assert train.shape == test.shape == (2, 1, 16, 16)
    expected = 40 / 65535 / 0.226  # of ImageNet's mean standard deviation
    torch.testing.assert_close(test_2 - test, torch.full_like(test, expected), atol=1e-4, rtol=0)
    assert (train != train_2).flatten(1).any(dim=1).all()
    path = tmp_path / "data/test/a/0.png"
    rounded = np.asarray(PixelFormat().open(path))
    image = Image.fromarray(ramp.astype(np.uint16))
    image.save(path)
    # RGB images lose most of it.
    assert (rounded == np.asarray(PixelFormat().open(path))).mean() > 0.7


def test_a_guide_and_a_student_learn_from_gray_images(root: Path, guide: Path) -> None:
    result = lg.evaluate(load_trained_config(guide, ["TEST.WEIGHTS", guide, "DEVICE", "cpu"]))
    assert (result.probabilities.argmax(1) == result.labels).mean() > 0.9
    cfg = config(GUIDED, root, *WINDOW, "DISTILLATION.TEACHER_WEIGHTS", guide)
    trainer.train(cfg)
    assert (root / "vit_digits_ours/train_batch.jpg").exists()
    weights = root / "vit_digits_ours/model.pyth"
    own = load_trained_config(weights, ["TEST.WEIGHTS", weights, "DEVICE", "cpu"])
    assert len(own.DATA_LOADER.MEAN) == 1
    assert own.DATA_LOADER.MEAN[0] == pytest.approx(0.5, abs=0.02)
    result = lg.evaluate(own)
    for image, wanted in zip(
        build_predictor(own)(result.images), result.probabilities, strict=True
    ):  # type: ignore[arg-type]
        np.testing.assert_allclose(image.probabilities, wanted, atol=1e-5)
    # The report shows gray images, too.
    (subject,) = evaluate_runs(read_runs([str(weights.parent)]), ["DEVICE", "cpu"])
    tested = subject.tested
    assert tested is not None and tested.dataset.image(0).mode == "F"
    found = replace(tested.predictions, labels=1 - tested.predictions.labels)
    assert (
        mistakes._gallery(found, tested.dataset, np.arange(2)).count("data:image/png;base64") == 2
    )


def test_other_channels_are_refused(root: Path, guide: Path, tmp_path: Path) -> None:
    colour = config(GUIDED, root, "DISTILLATION.TEACHER_WEIGHTS", guide, "MODEL.IN_CHANNELS", 3)
    with pytest.raises(CheckpointError, match=r"trained with MODEL\.IN_CHANNELS 1.*IN_CHANNELS 3"):
        builders.build_guided(colour)
    with pytest.raises(CheckpointError, match=r"the model has \[16, 3, 3, 3\].*channels"):
        lg.load_weights(lg.build_model(config(GUIDE, root, "MODEL.IN_CHANNELS", 3)), guide)
    with pytest.raises(ConfigError, match="IN_CHANNELS is 2, but images are RGB or gray"):
        trainer.train(config(GUIDE, tmp_path, "MODEL.IN_CHANNELS", 2))
    narrow = Preprocessing(16, mean=(0.4578,), std=(0.0011,))
    assert "Black is 416 standard deviations" in builders.range_note(narrow)
    assert builders.range_note(Preprocessing(16)) == ""
    with pytest.raises(ConfigError, match=r"WINDOW is \[\], but .* was trained with \[29500, 305"):
        trainer.test(config(GUIDE, root, "TEST.WEIGHTS", guide))
    with pytest.raises(ConfigError, match=r"WINDOW is \[\], but .* was trained with \[29500, 305"):
        builders.build_guided(config(GUIDED, root, "DISTILLATION.TEACHER_WEIGHTS", guide))
    for opts, advice in (
        (("MODEL.IN_CHANNELS", 3, "DATA_LOADER.WINDOW", [0, 9]), "only gray images"),
        (("DATA_LOADER.WINDOW", [9, 0]), "low below high"),
        (("DATA_LOADER.WINDOW", [9]), "low below high"),
    ):
        with pytest.raises(ConfigError, match=advice):
            config(GUIDE, root, *opts)


def test_every_data_set_gives_gray_images(root: Path) -> None:
    cfg = lg.load_config(GUIDE, ["MODEL.IN_CHANNELS", "1"])
    digits = builders.build_train_data(cfg)  # a subset
    assert pixel_tensor(digits.image(0)).shape == (8, 8, 1)
    rgb = builders.build_train_data(lg.load_config(GUIDE)).image(0)
    assert values(digits.image(0)) == np.asarray(rgb)[..., 0].ravel().tolist()
    assert inspect_image(digits, 0).mode == ""
    facts = inspect_image(builders.build_train_data(config(GUIDE, root)), 0)
    assert facts.mode in facts.natural_modes


FAMILIES = "deit/deit-ti t2t/t2t-7 pit/pit-ti pvt/pvt-ti pvtv2/pvtv2-b0 convit/convit-ti cvt/cvt-13"


@pytest.mark.parametrize("name", [*FAMILIES.split(), "resnet/r-56", "resnet/r-18"])
def test_every_family_takes_gray_images(name: str) -> None:
    suffix = "" if name.startswith("resnet") else "_base"
    cfg = lg.load_config(CONFIGS / f"{name}_c100{suffix}.yaml", ["MODEL.IN_CHANNELS", "1"])
    model = lg.build_model(cfg).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, *[cfg.MODEL.IMG_SIZE] * 2)).shape == (1, 100)


def test_exports_are_checked_on_the_test_images(root: Path, guide: Path) -> None:
    cfg = load_trained_config(guide, ["TEST.WEIGHTS", str(guide)])
    loader = builders.build_test_loader(
        cfg, builders.build_test_data(cfg), World(), torch.device("cpu")
    )
    with contextlib.closing(loader):
        wanted = next(iter(loader)).images
    found = _check_batch(cfg, build_predictor(cfg), [])
    torch.testing.assert_close(found, wanted[: len(found)], rtol=0, atol=1e-5)


def test_gray_timm_models_are_exported(root: Path, tmp_path: Path) -> None:
    cfg = config(CONFIGS / "digits/vit_digits_base.yaml", root, "OUT_DIR", tmp_path, *WINDOW)
    torch.manual_seed(0)
    model = lg.build_model(cfg)
    for name, parameter in model.named_parameters():
        if name in model.head_names():
            torch.nn.init.normal_(parameter)
    state = {"model_state": lg.published_state_dict(model), "class_names": ["across", "down"]}
    state["cfg"] = config(
        CONFIGS / "digits/vit_digits_base.yaml",
        root,
        *WINDOW,
        *("DATA_LOADER.NORMALIZE", "values", "DATA_LOADER.MEAN", [0.5], "DATA_LOADER.STD", [0.1]),
    ).dump()
    torch.save(state, tmp_path / "model.pyth")
    weights = str(tmp_path / "model.pyth")
    cfg = load_trained_config(weights, ["TEST.WEIGHTS", weights])
    (written,) = export(cfg, formats=["timm"], out=None, images=[])
    assert written.parity.is_met and written.parity.count == 24
