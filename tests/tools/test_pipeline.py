"""`--mode pipeline`: guide, plain and guided student in one go."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lg
import run_net
from lg import builders, trainer
from lg.config import flatten
from lg.distributed import World
from lg.errors import ConfigError
from lg.tools import pipeline
from tests.run_cases import TINY, dotted, key_values

CONFIG = "configs/digits/vit_digits_ours.yaml"


def opts(**changes: Any) -> list[str]:
    keys = ("TRAIN.FRACTION", "DATA_LOADER.NUM_WORKERS", "DEVICE", "LOG_PERIOD")
    values = {key: TINY[key] for key in keys if key in TINY}
    values |= {"TRAIN.FRACTION": 0.1, "LOG_PICTURES": False, "VERBOSE": False}
    values |= {"DEVICE": "cpu", "DATA_LOADER.NUM_WORKERS": 0}
    values |= dotted(changes)
    return key_values(values)


@pytest.fixture(name="guide")
def guide_fixture(tmp_path: Path) -> str:
    """A guide of one epoch."""
    path = tmp_path / "g.yaml"
    path.write_text("_BASE_: configs/digits/r-8_digits.yaml\nOPTIM: {MAX_EPOCH: 1}")
    return str(path)


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    steps, train_step = [], trainer.train_step
    monkeypatch.setattr(
        trainer, "train_step", lambda *a, **k: steps.append(1) or train_step(*a, **k)
    )
    return steps


def test_three_models_are_trained_once_and_compared(
    tmp_path: Path,
    guide: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = count_steps(monkeypatch)
    words = ["run_net.py", "--mode", "pipeline", "--guide", guide, "--plain", "--cfg", CONFIG]
    student = {"OPTIM__MAX_EPOCH": 1, "OPTIM__WARMUP_EPOCHS": 0}
    more = opts(**student, TRAIN__BATCH_SIZE=60, OUT_DIR=tmp_path / "out")
    monkeypatch.setattr(sys, "argv", [*words, *more])
    run_net.main()
    assert len(steps) == 1 + 2 * 2  # of 120 images: batches of 100 for the guide, else of 60
    found = json.loads((tmp_path / "out/vit_digits_ours_pipeline.json").read_text())
    assert list(found) == ["guide", "plain", "guided"]
    assert [found[k]["parameters"] for k in found] == [78_042, 678_634, 678_634]
    for name, result in found.items():
        folder = Path(result["folder"])
        assert folder.parent == tmp_path / "out" and (folder / "model.pyth").is_file()
        assert result["count"] == 597 and result["split"] == "digits/test"
        cfg = lg.load_config(folder / "config.yaml")
        assert cfg.DISTILLATION.ENABLE_INTER is (name == "guided")
    weights = Path(found["guide"]["folder"], "model.pyth")
    assert Path(cfg.DISTILLATION.TEACHER_WEIGHTS) == weights
    *rows, _, guide_place, plain_place, guided_place, _, command = (
        capsys.readouterr().out.splitlines()[-10:]
    )
    assert guide_place == f"guide model  {found['guide']['folder']}/model.pyth"
    assert plain_place == f"plain model  {found['plain']['folder']}/model.pyth"
    assert guided_place == f"guided model {found['guided']['folder']}/model.pyth"
    best = min(found, key=lambda name: found[name]["top1_err"])
    assert command.startswith(f"Classify images with the {best} model: python run_net.py --mode ")
    assert command.endswith(f"TEST.WEIGHTS {found[best]['folder']}/model.pyth")
    assert "top-1" in rows[0] and "95 % interval" in rows[0]
    assert [row.split("  ")[0] for row in rows[1:]] == [
        "ResNet-8, guide",
        "DeiT, plain",
        "DeiT, guided",
    ]
    assert f"{100 - found['guided']['top1_err']:.2f} %" in rows[3] and "678,634" in rows[3]
    # Nothing is trained again, and another student shares the guide.
    run_net.main()
    assert len(steps) == 5
    assert "The guide model is finished" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, *more, "DISTILLATION.INTER_WEIGHT", "1"])
    run_net.main()
    assert len(steps) == 5 + 2


def test_an_interrupted_pipeline_goes_on(
    tmp_path: Path, guide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def train(cfg: Any) -> None:
        if len(done) == 1:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(cfg.OUT_DIR)
        trainer.train(cfg)

    more = opts(OPTIM__MAX_EPOCH=1, OPTIM__WARMUP_EPOCHS=0, OUT_DIR=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pipeline.pipeline(CONFIG, more, guide, False, train)
    pipeline.pipeline(CONFIG, more, guide, False, train)
    assert "g-" in done[0] and "vit_digits_ours-" in done[2] and len(done) == 3


def test_a_plain_resnet_has_the_size_of_the_guided_one(tmp_path: Path, guide: str) -> None:
    depths: list[int] = []

    def train(cfg: Any) -> None:
        if depths.append(cfg.CNN.DEPTH) or len(depths) == 2:
            raise KeyboardInterrupt
        trainer.train(cfg)

    more = opts(MODEL__TYPE="ResNet", CNN__DEPTH=14, OUT_DIR=tmp_path)
    more += ["DISTILLATION.INTER_STUDENT_INDEX", "[0,1,2]"]
    with pytest.raises(KeyboardInterrupt):
        pipeline.pipeline(CONFIG, more, guide, True, train)
    assert depths == [14, 14]


def photos(tmp_path: Path) -> Path:
    """Return an image folder of two classes, three images each in training and test."""
    root = tmp_path / "photos"
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((8, 8, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_the_hash_follows_images_and_settings_but_not_places(tmp_path: Path) -> None:
    root = photos(tmp_path)

    def ident(place: Path, *more: str) -> str:
        data = ["TRAIN.DATASET", "image_folder", "TEST.DATASET", "", "DATA_LOADER.ROOT", str(place)]
        sizes = ["MODEL.NUM_CLASSES", "2", "TRAIN.BATCH_SIZE", "2", "TRAIN.FRACTION", "1.0"]
        cfg = lg.load_config("configs/digits/r-8_digits.yaml", [*data, *sizes, *more])
        return pipeline.settings_hash(cfg)

    first = ident(root)
    assert first == ident(root, "OUT_DIR", "x", "DEVICE", "cpu", "LOG_PERIOD", "3")
    shutil.copytree(root, tmp_path / "moved")
    assert first == ident(tmp_path / "moved")
    assert first != ident(root, "OPTIM.BASE_LR", "0.01")
    assert first != ident(root, "DATA_LOADER.NORMALIZE", "auto")
    weights = tmp_path / "model.pyth"
    weights.write_bytes(b"1")
    started = ident(root, "TRAIN.WEIGHTS", str(weights))
    shutil.copy(weights, tmp_path / "copy.pyth")
    assert started == ident(root, "TRAIN.WEIGHTS", str(tmp_path / "copy.pyth"))
    weights.write_bytes(b"2")
    assert len({first, started, ident(root, "TRAIN.WEIGHTS", str(weights))}) == 3
    (root / "train/a/1.png").rename(root / "train/a/9.png")
    assert first != ident(root)


def test_settings_of_the_images_reach_the_guide(tmp_path: Path) -> None:
    """The guide must not see images that are excluded, nor be trained for others."""
    root, guide = photos(tmp_path), tmp_path / "g.yaml"
    (tmp_path / "copies.txt").write_text("train/a/1.png\n")
    guide.write_text("_BASE_: configs/digits/r-8_digits.yaml\nTRAIN: {BATCH_SIZE: 2}")
    changes = {
        "TRAIN.DATASET": "image_folder",
        "TEST.DATASET": "image_folder",
        "DATA_LOADER.ROOT": str(root),
        "MODEL.NUM_CLASSES": 2,
        "TRAIN.FRACTION": 0.8,
        "TRAIN.SPLIT_SEED": 5,
        "TRAIN.EXCLUDE": str(tmp_path / "copies.txt"),
        "TRAIN.RESIZE": "letterbox",
        "TRAIN.HFLIP": 0.25,
        "TRAIN.BALANCE": "weights",
        "MODEL.IN_CHANNELS": 1,
        "RNG_SEED": 7,
    }
    keys, seen = list(changes), []

    def train(cfg: Any) -> None:
        values = dict(flatten(cfg))
        seen.append({key: values[key] for key in keys})
        raise KeyboardInterrupt

    more = [
        *opts(OUT_DIR=tmp_path, TRAIN__BATCH_SIZE=2),
        *(str(part) for pair in changes.items() for part in pair),
    ]
    with pytest.raises(KeyboardInterrupt):
        pipeline.pipeline(CONFIG, more, str(guide), False, train)
    assert seen == [changes]
    # The list of excluded images counts in the student's file, too.
    student = tmp_path / "s.yaml"
    student.write_text(
        f"_BASE_: {Path(CONFIG).resolve()}\nTRAIN: {{EXCLUDE: {changes['TRAIN.EXCLUDE']}}}"
    )
    place = more.index("TRAIN.EXCLUDE")
    del more[place : place + 2]
    with pytest.raises(KeyboardInterrupt):
        pipeline.pipeline(str(student), more, str(guide), False, train)
    assert seen[1] == seen[0]
    # A guide with a list of its own, or of other images, keeps what it has.
    cfg = pipeline.load_config(str(student), more)
    bare = pipeline.load_config(str(guide), more)
    listed = pipeline.load_config(str(guide), [*more, "TRAIN.EXCLUDE", "own.txt"])
    other = pipeline.load_config(str(guide), [*more, "DATA_LOADER.ROOT", str(tmp_path / "other")])
    assert [pipeline._can_exclude(each, cfg) for each in (bare, listed, other)] == [
        True,
        False,
        False,
    ]


def test_the_guide_is_found_by_the_name_of_its_weights(tmp_path: Path) -> None:
    found = pipeline.find_guide(CONFIG, "work_dirs/r-8_digits/model.pyth")
    assert Path(found).samefile("configs/digits/r-8_digits.yaml")
    (tmp_path / "mine.yaml").touch()
    student = str(tmp_path / "student.yaml")
    assert pipeline.find_guide(student, "x/mine/model.pyth") == str(tmp_path / "mine.yaml")
    for weights in ("x/none/model.pyth", None):
        with pytest.raises(ConfigError, match="of the guide with --guide"):
            pipeline.find_guide(student, weights)


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        (CONFIG, ["TRAIN.WEIGHTS", "/gone.pyth"], "leave out --plain"),
        ("configs/digits/vit_digits_base.yaml", [], "is not guided"),
        ("configs/digits/vit_digits_ours_offline.yaml", [], "give the config without it"),
        (CONFIG, ["LAUNCH.MODE", "slurm"], "set LAUNCH.MODE local"),
    ],
)
def test_what_cannot_run_is_rejected(config: str, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        pipeline.pipeline(config, more, None, "TRAIN.WEIGHTS" in more, trainer.train)


def test_missing_weights_are_found_before_the_guide_trains(tmp_path: Path) -> None:
    more = opts(TRAIN__WEIGHTS="/gone.pyth", OUT_DIR=tmp_path)
    with pytest.raises(ConfigError, match=r"TRAIN\.WEIGHTS is '/gone\.pyth', which cannot be read"):
        pipeline.pipeline(CONFIG, more, None, False, trainer.train)
    assert not any(tmp_path.iterdir())


def test_images_that_the_students_file_holds_out_are_new_to_the_guide(
    tmp_path: Path, guide: str
) -> None:
    student = tmp_path / "s.yaml"
    student.write_text(
        f"_BASE_: {CONFIG}\nTRAIN: {{VAL_FRACTION: 0.2, FRACTION: 0.5, SPLIT_SEED: 3}}"
    )
    seen: list[Any] = []

    def train(cfg: Any) -> None:
        seen.append(cfg)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.pipeline(str(student), ["OUT_DIR", str(tmp_path)], guide, False, train)
    mine = builders.fetch_data(lg.load_config(student), World()).test
    assert len(mine) == 120
    assert not set(mine.indices) & set(builders.build_train_data(seen[0]).indices)


def test_how_often_a_run_is_tested_changes_its_result() -> None:
    hashes = {
        pipeline.settings_hash(lg.load_config(CONFIG, opts(TEST__PERIOD=period)))
        for period in (1, 50)
    }
    assert len(hashes) == 2
