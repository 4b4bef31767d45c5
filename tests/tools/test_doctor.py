"""`--mode doctor`: what it finds, that no finding hides another, and that it leaves no files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lg
from lg import builders, trainer
from lg.errors import ConfigError
from lg.tools.doctor import doctor, findings
from lg.tools.doctor.checkup import check_config
from lg.tools.doctor.findings import COST, DATA, FACT, MODEL, NOTE, OUTPUT, PROBLEM, Finding
from tests.datasets.test_scan import config, make_folder, picture, spoil
from tests.run_cases import CONFIGS, TINY, dotted, key_values


def digits(out_dir: Path, guide: str | Path = "", **changes: Any) -> Any:
    values = {**TINY, "OUT_DIR": out_dir, "DISTILLATION.INTER_STUDENT_INDEX": [0, 1]}
    values |= {"DISTILLATION.INTER_TEACHER_INDEX": [0, 2]}
    values |= {"DISTILLATION.TEACHER_WEIGHTS": guide} if guide else {}
    values |= dotted(changes)
    return lg.load_config(CONFIGS / "digits/vit_digits_ours.yaml", key_values(values))


def guide_file(path: Path, *, num_classes: int = 10, **facts: Any) -> Path:
    """Save a guide as training does, or its weights alone if there are no other facts."""
    cfg = lg.load_config(
        CONFIGS / "digits/r-8_digits.yaml", ["MODEL.NUM_CLASSES", str(num_classes)]
    )
    weights = lg.published_state_dict(lg.build_model(cfg))
    torch.save({"model_state": weights, **facts} if facts else weights, path)
    return path


def texts(findings: list[Finding], level: str, topic: str = "") -> list[str]:
    return [f.text for f in findings if f.level == level and topic in ("", f.topic)]


def snapshot(folder: Path) -> dict[str, tuple[int, float]]:
    paths = [folder, *folder.rglob("*")] if folder.exists() else []
    return {str(p): (p.stat().st_size, p.stat().st_mtime) for p in paths}


def test_a_good_config_has_no_problems_and_leaves_no_files(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    guide = guide_file(
        tmp_path / "guide.pyth",
        test_err=12.5,
        cfg="MODEL: {IMG_SIZE: 16}\nTRAIN: {DATASET: digits}",
    )
    larger = lg.build_model(digits(tmp_path / "run", guide, MODEL__IMG_SIZE=24))
    start = tmp_path / "start.pyth"  # of another image size
    torch.save(lg.published_state_dict(larger), start)
    before = snapshot(tmp_path)
    cfg = digits(tmp_path / "run", guide, TRAIN__WEIGHTS=start)
    doctor(cfg)
    assert snapshot(tmp_path) == before
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in findings.TOPICS] == list(findings.TOPICS)
    # The training is shorter than any that trains something.
    assert lines[-1] == "No problems, 2 notes: ready to train."
    text = " ".join(" ".join(lines).split())
    assert "digits/train: 120 training images in 10 classes of 12, 8 x 8 pixels" in text
    assert "3 epochs are short for strong augmentation: " in text
    assert "has only 12 optimiser steps (3 epochs of 4): raise OPTIM.MAX_EPOCH to 50 or" in text
    assert f"the guide's test error is 12.5 % ({guide})." in text
    assert "Guidance: block 0 imitates stage 0, block 1 imitates stage 2 of the guide (" in text
    assert (
        "cpu (DEVICE cpu), fp32 (TRAIN.MIXED_PRECISION False), images read in parallel: 1 (D"
        in text
    )
    assert " per step of 30 images: " in text and "for the 12 steps of 3 epochs, " in text


def test_checkpoint_sizes_are_estimated_and_checkpoints_are_reported(tmp_path: Path) -> None:
    guide = guide_file(tmp_path / "guide.pyth")
    changes = {"OPTIM__WARMUP_EPOCHS": 0, "TRANSFORMER__HIDDEN_DIM": 96}
    cfg = digits(tmp_path / "run", guide, OPTIM__MAX_EPOCH=1, **changes)
    found = check_config(cfg)
    trainer.train(cfg)
    size = (tmp_path / "run/checkpoints/model_epoch_0001.pyth").stat().st_size
    estimate = next(text for text in texts(found, FACT, OUTPUT))
    megabytes = float(estimate.removeprefix("a checkpoint takes ").split(" MB")[0])
    assert abs(megabytes - size / 1e6) < 0.06 and size > 2e6
    before = snapshot(tmp_path / "run")
    notes = texts(check_config(cfg), NOTE, OUTPUT)
    assert notes == [
        f"{tmp_path}/run/checkpoints has all 1 epochs of OPTIM.MAX_EPOCH, so there is nothing left "
        "to train: raise OPTIM.MAX_EPOCH, or set OUT_DIR to a new folder."
    ]
    assert snapshot(tmp_path / "run") == before
    longer = digits(tmp_path / "run", guide, TRAIN__AUTO_RESUME=False, **changes)
    found = check_config(longer)
    assert texts(found, NOTE, OUTPUT) == [
        "Resuming with other settings than before: OPTIM.MAX_EPOCH: 1 -> 3.",
        f"training resumes after epoch 1 of 3 ({tmp_path}/run/checkpoints).",
    ]
    assert texts(found, PROBLEM)[0].startswith("TRAIN.AUTO_RESUME is False, but ")
    wider = digits(tmp_path / "run", guide, TRANSFORMER__HIDDEN_DIM=32)
    (problem,) = texts(check_config(wider), PROBLEM)
    assert "TRANSFORMER.HIDDEN_DIM: 96 -> 32" in problem


def test_all_problems_are_found_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_folder(tmp_path / "set")
    bad = spoil(root)
    (root / "train/empty").mkdir()
    (root / "val/wolf").mkdir()
    picture(0).save(root / "val/wolf/a.png")
    shutil.copy(root / "train/cat/2.png", root / "train/dog/other.png")
    shutil.copy(root / "train/cat/3.png", root / "val/cat/taught.png")
    (tmp_path / "run").write_text("a file where OUT_DIR should be")
    cfg = config(root, tmp_path / "run", NUM_GPUS=1)
    with pytest.raises(SystemExit) as stopped:
        doctor(cfg)
    assert stopped.value.code == 1
    text = capsys.readouterr().out
    joined = " ".join(text.split())
    assert f"{root}/train/empty contains no images" in joined
    assert f"{root}/val has the class 'wolf', which is not among those trained (" in joined
    assert "3 of the 14 training images cannot be read; the first one stops the run." in joined
    assert "1 of the 7 validation images cannot be read; " in joined
    assert all(f"\n{'':13}{path}: " in text for path in bad)
    assert "1 training image identical to an image of another class, so one label is" in joined
    pair = f"{root}/train/cat/2.png and {root}/train/dog/other.png ('cat' and 'dog')"
    assert f"\n{'':13}{pair}\n" in text
    assert "1 of the 7 validation images are identical to training images, so the valid" in joined
    assert f"{root}/val/cat/taught.png and {root}/train/cat/3.png" in joined
    assert f"OUT_DIR is {tmp_path}/run, but {tmp_path}/run is a file: name a folder." in joined
    assert "not measured because of problems with data: fix them and run this again." in joined
    assert "NUM_CLASSES" not in joined  # two classes, once the empty folder is gone
    assert text.splitlines()[-1] == "7 problems to fix before training, 4 notes."


def test_skipped_images_are_a_note_and_training_is_measured(tmp_path: Path) -> None:
    spoil(make_folder(tmp_path / "set"))
    cfg = config(tmp_path / "set", tmp_path / "run", DATA_LOADER__ON_ERROR="skip")
    found = check_config(cfg)
    assert texts(found, PROBLEM) == []
    first, *notes = (text.splitlines()[0] for text in texts(found, NOTE, DATA))
    assert first.startswith(f"TEST.SPLIT is test, but {tmp_path}/set has no test set: ")
    assert notes == [
        "3 of the 13 training images cannot be read and are skipped (DATA_LOADER.ON_ERROR skip):",
        "10 training images less than 16 pixels wide or high (the first is "
        f"{tmp_path}/set/train/cat/0.png, 12 x 9)",
        "1 of the 6 validation images cannot be read and are skipped (DATA_LOADER.ON_ERROR skip):",
        "5 validation images less than 16 pixels wide or high (the first is "
        f"{tmp_path}/set/val/cat/6.png, 12 x 9)",
    ]
    assert "for the 4 steps of 2 epochs" in texts(found, FACT, COST)[0]


def test_problems_of_the_guide_are_all_found(tmp_path: Path) -> None:
    guide = guide_file(tmp_path / "guide.pyth", num_classes=7)
    changes = {"DISTILLATION__INTER_STUDENT_INDEX": [0, 5], "DEVICE": "cuda"}
    cfg = digits(tmp_path / "run", guide, **changes)
    found = check_config(cfg)
    taps, weights, device = texts(found, PROBLEM, MODEL) + texts(
        found, PROBLEM, "Device and precision"
    )
    assert taps == (
        "DISTILLATION.INTER_STUDENT_INDEX is [0, 5]: block index 5 is out of range: the model has "
        "2 blocks, numbered 0 to 1; use [0, 1] for the same relative depth."
    )
    assert weights.startswith(f"DISTILLATION.TEACHER_WEIGHTS: {guide}: the weights do not fit ")
    assert "head.fc.weight is [7, 64], the model has [10, 64]" in weights
    assert device == "DEVICE is cuda, but torch finds no GPU: set DEVICE cpu."
    assert texts(found, NOTE, COST) == [
        "not measured because of problems with model, guide or device: fix them and run this again."
    ]


def test_a_weak_guide_of_other_data_is_noted(tmp_path: Path) -> None:
    trained = yaml.dump({"MODEL": {"IMG_SIZE": 16}, "TRAIN": {"DATASET": "other"}, "RNG_SEED": 2})
    facts = {"test_err": 85.0, "ema_err": 100.0, "cfg": trained}
    guide = guide_file(tmp_path / "guide.pyth", **facts)
    found = check_config(digits(tmp_path / "run", guide, TRAIN__VAL_FRACTION=0.25))
    assert texts(found, NOTE, MODEL) == [
        f"the guide's test error is 85.0 % ({guide}), where guessing gives 90.0 %: train the "
        "guide first.",
        f"the guide was trained on other, but TRAIN.DATASET is digits ({guide}).",
    ]


@pytest.mark.parametrize(
    ("trained", "is_told"),
    [
        ({"VAL_FRACTION": 0.25, "SPLIT_SEED": 1}, False),
        ({"VAL_FRACTION": 0.25, "SPLIT_SEED": 2}, True),
        ({"VAL_FRACTION": 0.0, "SPLIT_SEED": 1}, True),
        ({"VAL_FRACTION": 0.25}, False),  # before there was SPLIT_SEED, RNG_SEED selected
    ],
)
def test_a_guide_that_saw_the_held_out_images_is_noted(
    trained: dict[str, Any], is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = {"TRAIN": {"FRACTION": 0.1, **trained}, "MODEL": {"IMG_SIZE": 16}, "RNG_SEED": 1}
    guide = guide_file(tmp_path / "guide.pyth", test_err=50.0, cfg=yaml.dump(mine))
    cfg = digits(tmp_path / "run", guide, TRAIN__VAL_FRACTION=0.25, OPTIM__MAX_EPOCH=1)
    note = "the guide was trained on some of the held-out images, so they are less new"
    notes = texts(check_config(cfg), NOTE, MODEL)
    assert [each.startswith(note) for each in notes] == [True] * is_told
    trainer.train(cfg)
    assert (f"Warning: {note}" in capsys.readouterr().err) == is_told


def test_settings_that_training_rejects_are_problems(tmp_path: Path) -> None:
    cfg = digits(tmp_path / "run", tmp_path / "none.pyth", TRAIN__BATCH_SIZE=200)
    assert texts(check_config(cfg), PROBLEM) == [
        f"DISTILLATION.TEACHER_WEIGHTS is '{tmp_path}/none.pyth', which does not exist. Check the "
        "path, or train the model that writes it first (--mode pipeline trains guide and student).",
        "TRAIN.BATCH_SIZE is 200, but there are only 120 training images; lower it to 120 or less.",
    ]
    with pytest.raises(ConfigError, match="or set it to null for a guide with random weights"):
        builders.check_training(cfg, trained_guide=False)
    opts = ["MODEL.PRETRAINED", str(tmp_path / "none.safetensors")]
    pretrained = lg.load_config(CONFIGS / "timm/convnext-atto_flowers.yaml", opts)
    with pytest.raises(
        ConfigError, match=r"MODEL\.PRETRAINED is .*, or download the weights first"
    ):
        builders.check_training(pretrained)
    nowhere = config(tmp_path / "nowhere", tmp_path / "run")
    (missing,) = texts(check_config(nowhere), PROBLEM)
    assert missing.startswith(f"image_folder: {tmp_path}/nowhere is missing; set DATA_LOADER.ROOT")


def test_every_exception_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> Any:
        raise KeyError("something odd")

    def overflow(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    cfg = digits(tmp_path / "run", guide_file(tmp_path / "guide.pyth"))
    monkeypatch.setattr("lg.tools.doctor.checkup.build_run", build)
    assert texts(check_config(cfg), PROBLEM) == [
        "taking the first training steps fails (KeyError: 'something odd'); --mode train would "
        "fail too."
    ]
    monkeypatch.setattr("lg.tools.doctor.checkup.build_run", overflow)
    assert texts(check_config(cfg), PROBLEM) == [
        "taking the first training steps runs out of memory (CUDA out of memory. Tried to allocate "
        "9 GiB). Set TRAIN.ACCUM_STEPS 2 or TRAIN.MIXED_PRECISION True, which keep the recipe, or "
        "lower TRAIN.BATCH_SIZE. TEST.BATCH_SIZE 200, DATA_LOADER.NUM_WORKERS and decoded images "
        "(none with DATA_LOADER.BACKEND workers) take memory too."
    ]


def test_losses_that_are_not_finite_are_a_problem(tmp_path: Path) -> None:
    guide = guide_file(tmp_path / "guide.pyth")
    changes = {"OPTIM__BASE_LR": 1e30, "OPTIM__WARMUP_EPOCHS": 0, "OPTIM__CLIP_GRAD_NORM": 0.0}
    (problem,) = texts(check_config(digits(tmp_path, guide, **changes)), PROBLEM)
    assert problem.startswith("the losses of the first steps are ") and ", nan" in problem


def test_stored_features_of_other_images_are_a_problem(tmp_path: Path) -> None:
    import precompute_feature

    guide, bank = guide_file(tmp_path / "guide.pyth"), tmp_path / "bank"
    changes = {"DISTILLATION__OFFLINE": True, "DISTILLATION__FEATURE_FILE": bank}
    changes |= {"TRAIN__MIXUP_ALPHA": 0.0, "TRAIN__CUTMIX_ALPHA": 0.0}
    cfg = digits(tmp_path / "run", guide, **changes)
    precompute_feature.run(precompute_feature.parse_args(["--cfg", "x.yaml"]), cfg)
    found = check_config(cfg)
    assert texts(found, PROBLEM) == []
    assert f"{bank} holds the guide's maps of the training images." in texts(found, FACT, MODEL)
    more = digits(tmp_path / "run", guide, **changes, TRAIN__FRACTION=0.5)
    (problem,) = texts(check_config(more), PROBLEM, MODEL)
    assert problem.startswith(f"{bank} does not match this training: it lacks 480 ")


def test_disk_space_of_a_missing_folder_is_that_of_its_parent(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "there")
    cfg = digits(tmp_path / "there/not/yet", guide_file(tmp_path / "guide.pyth"))
    found = check_config(cfg)
    assert texts(found, FACT, OUTPUT)[0].endswith(f" are free in {tmp_path}/there.")
    assert list((tmp_path / "there").iterdir()) == []
