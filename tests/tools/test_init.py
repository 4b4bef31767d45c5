"""`--mode init`: folders of images, plans, and configs that load and train."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lg
import run_net
from lg.builders import build_test_data, build_train_data
from lg.errors import ConfigError, DataError
from lg.tools.init import command, plan
from lg.tools.init.folder import look
from lg.tools.init.speed import Speed, measure_speed


def save_images(folder: Path, count: int, side: int = 40, brightest: int = 255) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        random = np.random.default_rng(number)
        small = random.integers(0, brightest, (side // 4, side // 4 + 2, 3), dtype=np.uint8)
        pixels = small.repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture(name="photos")
def photos_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with train/ (cat 20, dog 10 images) and test/ (4 each), in the working directory."""
    for name, count in (("cat", 20), ("dog", 10)):
        save_images(tmp_path / "photos/train" / name, count)
        save_images(tmp_path / "photos/test" / name, 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "measure_speed", lambda cfg: Speed(0.01, True))
    return tmp_path / "photos"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run_net.py", "--mode", "init", *words])
    run_net.main()


def test_configs_for_train_and_test(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--data", "photos", "--minutes", "1")
    student = lg.load_config("photos_configs/photos_deit-ti.yaml")
    guide = lg.load_config("photos_configs/photos_guide.yaml")
    for cfg in (guide, student):
        assert cfg.MODEL.NUM_CLASSES == 2 and Path(cfg.DATA_LOADER.ROOT) == photos
        assert (cfg.TRAIN.VAL_FRACTION, cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.HFLIP) == (0.1, 8, 0.5)
        assert cfg.TRAIN.MIXED_PRECISION and cfg.TRAIN.BALANCE == "weights"
        assert cfg.TEST.SPLIT == "test"
        assert len(build_train_data(cfg)) == 27 and len(build_test_data(cfg)) == 8
    assert f"{guide.OUT_DIR}/model.pyth" == student.DISTILLATION.TEACHER_WEIGHTS
    # Images of 40 pixels: 32 fits; 64 would enlarge them to more than 1.5 times.
    assert (student.MODEL.IMG_SIZE, student.TRANSFORMER.PATCH_SIZE) == (32, 4)
    assert student.DISTILLATION.INTER_STUDENT_INDEX == [0, 6, 11]
    # 3 steps an epoch: at least 600 steps, whatever the time.
    assert (guide.OPTIM.MAX_EPOCH, student.OPTIM.MAX_EPOCH) == (200, 200)
    # 0.1 * 8 / 128 and 5e-4 * sqrt(8 / 128), two digits.
    assert (guide.OPTIM.BASE_LR, student.OPTIM.BASE_LR) == (0.0063, 0.00013)
    text = Path("photos_configs/photos_deit-ti.yaml").read_text()
    assert "# 2 classes, 10 to 20 training images each: cat, dog" in text
    assert max(map(len, text.splitlines())) <= 130
    said = capsys.readouterr().out
    assert "2 classes; images: 30 in train, 8 in test." in said
    assert "3 training images are held out" in said and "TRAIN.BALANCE is weights" in said
    commands = [line for line in said.splitlines() if "python run_net.py" in line]
    modes = [line.split("--mode ")[1].split()[0] for line in commands]
    assert modes == ["pipeline", "doctor", "train", "train", "predict"]
    assert "predict --images photos/test TEST.WEIGHTS work_dirs/photos_deit-ti/" in commands[-1]


def test_a_folder_of_classes_holds_out_images(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "--data", "photos/train", "--model", "pvt-ti", "--out", "mine")
    cfg = lg.load_config("mine/train_pvt-ti.yaml")
    assert cfg.TRAIN.VAL_FRACTION == 0.2 and cfg.TRANSFORMER.PATCH_SIZE == [4, 2, 2, 2]
    assert len(build_train_data(cfg)) == 24 and len(build_test_data(cfg)) == 6


def test_val_and_test_leave_all_training_images(photos: Path) -> None:
    save_images(photos / "val/cat", 2)
    save_images(photos / "val/dog", 2)
    facts = look(str(photos))
    assert facts.val_fraction == 0 and facts.num_train == 30
    assert facts.splits == {"train": 30, "val": 4, "test": 8} and facts.root == photos


def test_other_names_of_splits_are_read(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "train").rename(photos / "Training")
    (photos / "test").rename(photos / "TEST")
    (photos / "__MACOSX").mkdir()
    run(monkeypatch, "--data", "photos")
    assert "predict --images photos/TEST TEST.WEIGHTS" in capsys.readouterr().out
    run(monkeypatch, "--data", "photos")  # the same again
    cfg = lg.load_config("photos_configs/photos_deit-ti.yaml")
    assert len(build_train_data(cfg)) == 27 and len(build_test_data(cfg)) == 8


def test_dark_images_are_normalised_by_their_own_numbers(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        save_images(photos.parent / "scans" / name, 4, brightest=80)
    run(monkeypatch, "--data", "scans")
    assert "DATA_LOADER.NORMALIZE auto" in capsys.readouterr().out
    cfg = lg.load_config("scans_configs/scans_guide.yaml")
    assert cfg.DATA_LOADER.NORMALIZE == "auto"
    run(monkeypatch, "--data", "photos")
    assert lg.load_config("photos_configs/photos_guide.yaml").DATA_LOADER.NORMALIZE == "imagenet"


def test_an_unpacked_archive_may_have_outer_folders(photos: Path) -> None:
    outer = photos.parent / "archive/dataset"
    outer.mkdir(parents=True)
    photos.rename(outer / "photos")
    facts = look(str(outer.parent))
    assert facts.root == outer / "photos" and "The images are in" in facts.notes[0]


def test_folders_without_classes_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        look(str(tmp_path / "none"))
    save_images(tmp_path / "flat", 3)
    with pytest.raises(DataError, match="contains 3 images but no class folders: move"):
        look(str(tmp_path / "flat"))
    save_images(tmp_path / "one/cat", 3)
    with pytest.raises(DataError, match=r"has one class \(cat\)"):
        look(str(tmp_path / "one"))


def test_digits_and_sides_are_not_mirrored(tmp_path: Path) -> None:
    for name in ("3", "7"):
        save_images(tmp_path / "digits" / name, 2)
    for name in ("left_hand", "right_hand"):
        save_images(tmp_path / "hands" / name, 2)
    for name in ("copyright", "cleft"):
        save_images(tmp_path / "words" / name, 2)
    found = [look(str(tmp_path / n)).are_symbols for n in ("digits", "hands", "words")]
    assert found == [True, True, False]


def test_a_changed_config_is_kept(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command.init("photos", "deit-ti", None, 10)
    path = Path("photos_configs/photos_guide.yaml")
    path.write_text("LOG_PERIOD: 3")
    with pytest.raises(ConfigError, match="exists and differs"):
        command.init("photos", "deit-ti", None, 10)
    assert path.read_text() == "LOG_PERIOD: 3"
    with pytest.raises(ConfigError, match="choose from convit-ti, cvt-13, deit-1m, deit-ti"):
        command.init("photos", "vit", None, 10)


@pytest.mark.parametrize("model", command.student_configs())
def test_every_student_can_be_planned(photos: Path, model: str) -> None:
    command.init("photos", model, None, 10)
    cfg = lg.load_config(f"photos_configs/photos_{model}.yaml")
    assert cfg.DISTILLATION.ENABLE_INTER and len(cfg.DISTILLATION.INTER_STUDENT_INDEX) == 3
    lr = cfg.OPTIM.BASE_LR
    assert lr == (0.00025 if model == "deit-1m" else 0.00013)


def facts_of(num_images: int, side: int = 400) -> command.FolderFacts:
    sizes = [num_images // 2] * 2
    return command.FolderFacts(
        Path("x"), ["a", "b"], sizes, {"train": num_images, "val": 9, "test": 9}, side
    )


def test_length_follows_data_and_machine() -> None:
    def make(seconds: float, num_images: int = 1280, side: int = 400) -> plan.Plan:
        return plan.make_plan(
            facts_of(num_images, side),
            minutes=10,
            student_lr=1e-3,
            guide_speed=Speed(seconds / 10, True),
            student_speed=lambda size: Speed(seconds * (size / 64) ** 2, False),
        )

    fast, medium, slow = make(1e-5), make(5e-3), make(1.0)
    assert [each.image_size for each in (fast, medium, slow)] == [224, 64, 64]
    assert [each.student.epochs for each in (fast, slow)] == [300, 60]
    assert fast.student.strong and not slow.student.strong
    # 10 minutes without the guide's: its epochs have 1,280 images at 0.0005 s.
    assert medium.guide.epochs == 281 and medium.guide.minutes == pytest.approx(3, abs=0.03)
    assert medium.student.epochs == int((10 - medium.guide.minutes) * 60 / (1280 * 5e-3))
    assert slow.student.warmup == 4 and fast.student.warmup == 20
    assert make(1e-5, side=45).image_size == 64 and make(1e-5, side=28).image_size == 32
    assert [plan.choose_batch(n) for n in (5, 100, 1000, 50_000)] == [5, 8, 64, 128]


def test_the_speed_of_a_guided_step_is_measured() -> None:
    opts = ["DISTILLATION.TEACHER_WEIGHTS", None, "DEVICE", "cpu"]
    cfg = lg.load_config("configs/digits/vit_digits_ours.yaml", opts)
    assert 1e-6 < measure_speed(cfg).seconds < 0.1
