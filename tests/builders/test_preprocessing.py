"""NORMALIZE: numbers of the data, kept by checkpoints, the same in tests, prediction and guides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import lg
import precompute_feature
from lg import builders, trainer
from lg.augment.batched import BatchTestTransform, BatchTransform, normalise, to_pixels
from lg.augment.preprocessing import Preprocessing, renormalization
from lg.config import load_trained_config
from lg.datasets import build_dataset
from lg.datasets.statistics import pixel_statistics
from lg.distributed import World
from lg.errors import BankError, CheckpointError, ConfigError
from lg.guidance import FeatureBank, FrozenTeacher
from lg.guidance.bank_file import open_bank
from lg.models import resnet
from lg.tools.predict import build_predictor

CONFIGS = Path(__file__).parents[2] / "configs/digits"
GUIDE, GUIDED = CONFIGS / "r-8_digits.yaml", CONFIGS / "vit_digits_ours.yaml"
OFFLINE = CONFIGS / "vit_digits_ours_offline.yaml"
IMAGENET = Preprocessing(image_size=16)
OTHER = Preprocessing(16, mean=(0.3, 0.2, 0.1), std=(0.5, 0.25, 0.125))


def config(path: Path, out: Path, *opts: Any) -> Any:
    words = (
        "TRAIN.FRACTION 0.1 TRAIN.BATCH_SIZE 40 OPTIM.MAX_EPOCH 1 OPTIM.WARMUP_EPOCHS 0 "
        f"DEVICE cpu DATA_LOADER.NUM_WORKERS 0 LOG_PICTURES False OUT_DIR {out}"
    )
    return lg.load_config(path, [*words.split(), *map(str, opts)])


def numbers(file: Path) -> tuple[list[float], list[float]]:
    """Return MEAN and STD in the config of a checkpoint."""
    options = yaml.safe_load(torch.load(file, weights_only=True)["cfg"])["DATA_LOADER"]
    return options["MEAN"], options["STD"]


@pytest.fixture(name="guide", scope="module")
def guide_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guide trained with NORMALIZE auto on 120 digits."""
    out = tmp_path_factory.mktemp("guide")
    trainer.train(config(GUIDE, out, "DATA_LOADER.NORMALIZE", "auto"))
    return out / "model.pyth"


def test_every_image_counts_the_same(tmp_path: Path) -> None:
    for name, size, colour in (("a", 4, (255, 0, 51)), ("b", 40, (0, 0, 153))):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (size, size), colour).save(tmp_path / "train" / name / "0.png")
    mean, std = pixel_statistics(build_dataset("image_folder", tmp_path, "train"), num_threads=2)
    assert mean == [0.5, 0.0, 0.4]
    assert std == [0.5, 0.0001, 0.2]  # black only: not 0


def test_checkpoints_keep_the_numbers_of_the_training_images(guide: Path) -> None:
    mean, std = numbers(guide)
    data = builders.build_train_data(config(GUIDE, guide.parent))
    images = np.stack([np.array(data.image(i)) for i in range(len(data))]) / 255
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)), atol=6e-6)
    np.testing.assert_allclose(std, images.std(axis=(0, 1, 2)), atol=6e-6)
    assert len(data) == 120 and mean[0] > 0.2
    # Inputs have mean 0 and standard deviation 1, before borders and resizing.
    prepared = builders.build_preprocessing(load_trained_config(guide))
    pixels = normalise(
        torch.from_numpy(images * 255).permute(0, 3, 1, 2), prepared.mean, prepared.std
    )
    assert abs(float(pixels.mean())) < 1e-3 and float(pixels.std()) == pytest.approx(1, abs=1e-3)


def test_tests_and_prediction_use_the_numbers_of_the_weights(guide: Path) -> None:
    own = load_trained_config(guide, ["TEST.WEIGHTS", str(guide)])
    wanted = lg.evaluate(own)
    auto = config(GUIDE, guide.parent, "DATA_LOADER.NORMALIZE", "auto")
    assert auto.DATA_LOADER.MEAN == []
    np.testing.assert_array_equal(lg.evaluate(auto).probabilities, wanted.probabilities)
    assert 100 * (wanted.probabilities.argmax(1) != wanted.labels).mean() == pytest.approx(
        trainer.test(auto).top1_err, abs=1e-3
    )
    data = builders.build_test_data(own)
    for cfg in (own, auto):
        found = build_predictor(cfg)([data.image(i) for i in range(3)])
        rows = [each.probabilities for each in found]  # type: ignore[union-attr]
        np.testing.assert_allclose(rows, wanted.probabilities[:3], atol=1e-5)
    with pytest.raises(ConfigError, match=r"NORMALIZE is imagenet.*was trained with mean"):
        trainer.test(config(GUIDE, guide.parent))


def test_weights_without_a_config_need_values(tmp_path: Path, guide: Path) -> None:
    file = tmp_path / "published.pyth"
    torch.save(torch.load(guide, weights_only=True)["model_state"], file)
    auto = ("TEST.WEIGHTS", file, "DATA_LOADER.NORMALIZE", "auto")
    with pytest.raises(ConfigError, match="set it to values"):
        trainer.test(config(GUIDE, tmp_path, *auto))
    mean, std = numbers(guide)
    auto = (*auto[:3], "values", "DATA_LOADER.MEAN", mean, "DATA_LOADER.STD", std)
    found = trainer.test(config(GUIDE, tmp_path, *auto))
    assert (
        found.top1_err == trainer.test(load_trained_config(guide, ["TEST.WEIGHTS", guide])).top1_err
    )
    for text in ("[", "MODEL: 3", "MODEL: {IMG_SIZE: 16}\nDATA_LOADER: {MEAN: [x], STD: 3}"):
        with pytest.raises(CheckpointError, match="damaged config"):
            builders.guide_preprocessing({"cfg": text}, "file", kind="ResNet", channels=3)


def test_a_run_resumes_with_its_numbers_only(tmp_path: Path) -> None:
    auto = ("DATA_LOADER.NORMALIZE", "auto")
    trainer.train(config(GUIDE, tmp_path, *auto))
    trainer.train(config(GUIDE, tmp_path, *auto, "OPTIM.MAX_EPOCH", 2))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    with pytest.raises(ConfigError, match=r"NORMALIZE: auto -> imagenet"):
        trainer.train(config(GUIDE, tmp_path, "OPTIM.MAX_EPOCH", 2))
    with pytest.raises(ConfigError, match=r"DATA_LOADER\.MEAN: "):  # of other images
        opts = ("OPTIM.MAX_EPOCH", 2, "TRAIN.RESUME_CHANGED", False, "TRAIN.VAL_FRACTION", 0.5)
        trainer.train(config(GUIDE, tmp_path, *auto, *opts))


@pytest.mark.parametrize("strong", [True, False])
def test_augmented_images_are_normalised_and_filled_with_the_numbers(strong: bool) -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8))
    found = []
    for each in (IMAGENET, OTHER):
        transform = BatchTransform(**vars(each), strong=strong)
        inputs, _ = transform(images, epochs=[0] * 40, index=range(40))
        found.append(to_pixels(inputs, each.mean, each.std).int().flatten(1, 2))
    fills = [torch.tensor([round(255 * m) for m in each.mean]) for each in (IMAGENET, OTHER)]
    same = (found[0] == found[1]).all(dim=2)
    if not strong:
        assert same.all()
        return
    # What differs is fill, or noise in an erased box, or derived from either.
    is_fill = (found[0] == fills[0]).all(dim=2)
    assert is_fill.sum() > 100
    assert ((found[1] == fills[1]).all(dim=2) & is_fill).sum() > 0.5 * is_fill.sum()
    assert same.float().mean() > 0.5


def test_guides_see_images_as_in_their_own_training(guide: Path) -> None:
    rng = np.random.default_rng(1)
    pixels = torch.from_numpy(rng.integers(0, 256, (4, 3, 16, 16)).astype(np.uint8))
    torch.manual_seed(0)
    model = resnet(depth=8, img_size=16, num_classes=10)
    options: dict[str, Any] = dict(indices=[0, 2], image_size=8, with_logits=True)
    maps, logits = FrozenTeacher(model, **options)(normalise(pixels, OTHER.mean, OTHER.std))
    change = renormalization(IMAGENET, OTHER)
    student = FrozenTeacher(model, **options, renormalize=change)
    found, others = student(normalise(pixels))
    for mine, wanted in zip([*found, others], [*maps, logits], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    assert renormalization(OTHER, OTHER) is None
    assert not [name for name in student.state_dict() if "scale" in name]
    # From configs: the student has ImageNet's numbers, the guide those in its file.
    opts = ("DISTILLATION.TEACHER_WEIGHTS", guide)
    teacher = builders.build_guided(config(GUIDED, guide.parent / "x", *opts))[1]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in numbers(guide))
    inputs = normalise(pixels)
    own = normalise(pixels, *numbers(guide))
    assert isinstance(teacher, FrozenTeacher)
    torch.testing.assert_close(inputs * teacher._scale + teacher._shift, own)
    assert not torch.allclose(inputs, own, atol=0.1) and mean.shape == std.shape


def test_stored_features_are_those_of_the_guides_own_images(tmp_path: Path, guide: Path) -> None:
    opts = ["TRAIN.FRACTION", "0.1", "DEVICE", "cpu", "DATA_LOADER.NUM_WORKERS", "0"]
    arguments = ["--cfg", str(OFFLINE), "--ckpt", str(guide), "--out", str(tmp_path / "bank")]
    args = precompute_feature.parse_args([*arguments, "--shifts", "3", "--dtype", "float32", *opts])
    precompute_feature.run(args, lg.load_config(args.cfg, args.opts))
    stored = open_bank(tmp_path / "bank").arrays[0]
    cfg = config(OFFLINE, tmp_path, "DISTILLATION.FEATURE_FILE", tmp_path / "bank")
    data = builders.build_train_data(cfg)
    model = builders.build_model(config(GUIDE, tmp_path))
    lg.load_weights(model, guide)
    mean, std = numbers(guide)
    transform = BatchTestTransform(image_size=16, mean=mean, std=std)
    images = torch.stack([torch.from_numpy(np.array(data.image(i))) for i in (0, 7)])
    inputs, _ = transform(images, epochs=[0, 0], index=[0, 1])
    shifted = inputs.roll(2, dims=3)  # the second stored view is shifted over black
    shifted[:, :, :, :2] = -(torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1)
    for view, each in enumerate((inputs, shifted)):
        wanted = FrozenTeacher(model, indices=[0], image_size=16)(each)[0][0]
        np.testing.assert_allclose(stored[[0, 7], view], wanted, rtol=1e-3, atol=1e-4)
    assert isinstance(builders.build_guided(cfg)[1], FeatureBank)


def test_numbers_that_cannot_take_effect_are_refused(tmp_path: Path) -> None:
    def fault(*opts: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            config(GUIDE, tmp_path, *opts)
        return str(caught.value)

    mean, std = ("DATA_LOADER.MEAN", [0.5] * 3), ("DATA_LOADER.STD", [0.2] * 3)
    values = ("DATA_LOADER.NORMALIZE", "values")
    assert "set DATA_LOADER.NORMALIZE to values" in fault(*mean, *std)
    assert "MEAN is []" in fault(*values, *std) and "STD is []" in fault(*values, *mean)
    assert "3 numbers" in fault(*values, *std, "DATA_LOADER.MEAN", [0.5])
    assert "between 0 and 1" in fault(*values, *std, "DATA_LOADER.MEAN", [124, 116, 104])
    assert "greater than 0" in fault(*values, *mean, "DATA_LOADER.STD", [0, 0.1, 0.1])
    assert "Did you mean auto" in fault("DATA_LOADER.NORMALIZE", "aut")
    prepared = builders.build_preprocessing(config(GUIDE, tmp_path, *values, *mean, *std))
    assert (prepared.mean, prepared.std) == ((0.5,) * 3, (0.2,) * 3)
    assert World().is_main


def test_borders_are_those_of_the_student_online_and_offline(tmp_path: Path, guide: Path) -> None:
    wide = Image.new("RGB", (8, 4))
    assert BatchTestTransform(image_size=8, resize="letterbox", fill=(1, 2, 3)).prepare(
        wide
    ).getpixel((0, 0)) == (1, 2, 3)
    opts = ["TRAIN.RESIZE", "letterbox", "DEVICE", "cpu", "DATA_LOADER.NUM_WORKERS", "0"]
    arguments = ["--cfg", str(OFFLINE), "--ckpt", str(guide), "--out", str(tmp_path / "bank")]
    args = precompute_feature.parse_args([*arguments, "TRAIN.FRACTION", "0.1", *opts])
    precompute_feature.run(args, lg.load_config(args.cfg, args.opts))
    provenance = open_bank(tmp_path / "bank").provenance
    assert provenance is not None and provenance.fill == [124, 116, 104]  # ImageNet's mean
    letterbox = (*opts[:2], "DISTILLATION.FEATURE_FILE", tmp_path / "bank")
    builders.build_guided(config(OFFLINE, tmp_path, *letterbox))
    other = ("DATA_LOADER.NORMALIZE", "values", "DATA_LOADER.MEAN", [0.2] * 3)
    with pytest.raises(BankError, match=r"fill .*124.* \(expected .*51"):
        builders.build_guided(
            config(OFFLINE, tmp_path, *letterbox, *other, "DATA_LOADER.STD", [0.3] * 3)
        )


@pytest.mark.parametrize(
    ("kind", "channels", "mean"),
    [
        ("timm/tf_efficientnet_lite0", 3, (0.5, 0.5, 0.5)),
        ("timm/resnet18", 3, (0.485, 0.456, 0.406)),
        ("timm/resnet18", 1, (0.449,)),
        ("ResNet", 3, (0.485, 0.456, 0.406)),
    ],
)
def test_guides_without_a_config_have_the_numbers_that_timm_states(
    kind: str, channels: int, mean: tuple[float, ...]
) -> None:
    found = builders.guide_preprocessing({}, "file", kind=kind, channels=channels)
    assert found.mean == mean


def test_weights_are_tested_with_the_shape_they_were_trained_with(guide: Path) -> None:
    opts = ("TRAIN.RESIZE", "letterbox", "TEST.WEIGHTS", guide)
    with pytest.raises(ConfigError, match=r"TRAIN\.RESIZE is letterbox, but .* with squash"):
        trainer.test(config(GUIDE, guide.parent, "DATA_LOADER.NORMALIZE", "auto", *opts))
