"""Offline guidance end to end: precompute_feature.py, then training on the stored features."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lg
import precompute_feature
from lg import builders, trainer
from lg.augment.batched import BatchTestTransform
from lg.datasets.loader import Samples
from lg.errors import BankError, ConfigError
from lg.guidance import FeatureBank
from tests.run_cases import (
    CONFIGS,
    TINY,
    assert_same,
    dotted,
    final_state,
    key_values,
    stats,
    train_and_stop,
)

ROOT = Path(__file__).parents[1]
GUIDE, GUIDED = CONFIGS / "digits/r-8_digits.yaml", CONFIGS / "digits/vit_digits_ours_offline.yaml"
DATA = {"TRAIN.FRACTION": 0.1, "DATA_LOADER.NUM_WORKERS": 0, "DEVICE": "cpu"}


def compute(*arguments: str, **changes: Any) -> None:
    """Run precompute_feature.py in this process."""
    opts = key_values(DATA | dotted(changes))
    args = precompute_feature.parse_args([*arguments, *opts])
    precompute_feature.run(args, lg.load_config(args.cfg, args.opts))


@pytest.fixture(name="bank", scope="module")
def bank_fixture(tmp_path_factory: pytest.TempPathFactory, guide_file: Path) -> Path:
    path = tmp_path_factory.mktemp("bank") / "bank"
    arguments = ["--cfg", str(GUIDE), "--ckpt", str(guide_file), "--out", str(path)]
    compute(*arguments, "--image-size", "16")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def config(out_dir: Path, bank: Path, guide_file: Path | None, **changes: Any) -> Any:
    values = TINY | {
        "OUT_DIR": str(out_dir),
        "TRAIN.MIXUP_ALPHA": 0.0,
        "TRAIN.CUTMIX_ALPHA": 0.0,
        "DISTILLATION.FEATURE_FILE": str(bank),
        "DISTILLATION.TEACHER_WEIGHTS": guide_file or "null",
        "DISTILLATION.INTER_STUDENT_INDEX": [0, 1],
        "DISTILLATION.INTER_TEACHER_INDEX": [0, 2],
    }
    values |= dotted(changes)
    return lg.load_config(GUIDED, key_values(values))


def test_the_bank_of_a_guided_config_holds_the_same_maps(
    bank: Path, guide_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "guided"
    compute(
        "--cfg",
        str(GUIDED),
        "--ckpt",
        str(guide_file),
        DISTILLATION__FEATURE_FILE=path,
        DISTILLATION__INTER_TEACHER_INDEX="[0,2]",
        DISTILLATION__INTER_STUDENT_INDEX="[0,1]",
    )
    banks = FeatureBank(bank, [0, 2]), FeatureBank(path, [0, 2])
    assert banks[1].provenance.layers == [0, 2] and banks[0].provenance.layers == [0, 1, 2]
    batch = torch.zeros(1, 3, 16, 16), torch.from_numpy(banks[0].indices[[3]])
    view = torch.tensor([[0.1, 0.2, 0.6, 0.5, 1.0]])
    for mine, theirs in zip(*(b(*batch, view)[0] for b in banks), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(BankError, match="holds blocks 0, 2 of the guide, not 1"):
        FeatureBank(path, [0, 1])


def test_whole_images_have_the_same_loss_offline_as_online(
    bank: Path, guide_file: Path, tmp_path: Path
) -> None:
    losses = []
    for offline in (True, False):
        cfg = config(tmp_path, bank, guide_file, DISTILLATION__OFFLINE=offline)
        torch.manual_seed(3)
        guided, guide, loss = lg.build_guided(cfg)
        dataset = builders.build_train_data(cfg)
        samples = Samples(dataset, BatchTestTransform(image_size=16))
        batch = samples.__getitems__([(0, row) for row in range(9)])
        logits, maps = guided.train()(batch[0])
        targets = torch.eye(10)[batch[1]]
        terms = loss(logits, maps, targets, *guide(batch[0], batch[2], batch[3]))
        losses.append((terms["cls"].item(), terms["inter"].item()))
    assert losses[0][0] != 0 and losses[0][1] == pytest.approx(losses[1][1], rel=1e-3)


def test_training_is_equal_when_interrupted_and_with_resident_maps(
    bank: Path, guide_file: Path, tmp_path: Path
) -> None:
    straight, stopped, resident = (tmp_path / name for name in ("straight", "stopped", "resident"))
    trainer.train(config(straight, bank, guide_file))
    train_and_stop(config(stopped, bank, guide_file), 6)
    trainer.train(config(stopped, bank, guide_file, DATA_LOADER__NUM_WORKERS=2))
    trainer.train(config(resident, bank, guide_file, DISTILLATION__FEATURE_PLACE="device"))
    expected = final_state(straight)
    expected.pop("cfg")
    for other in (stopped, resident):
        state = final_state(other)
        state.pop("cfg")
        assert_same(state, expected)
        assert_same(stats(other), stats(straight))
    inter = [s["inter_distill_loss"] for s in stats(straight) if s["_type"] == "train_iter"]
    assert len(inter) == 4 and min(inter) > 0


def test_training_does_not_need_the_teachers_file(bank: Path, tmp_path: Path) -> None:
    trainer.train(config(tmp_path, bank, None, OPTIM__MAX_EPOCH=1))
    assert (tmp_path / "model.pyth").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TRAIN.SPLIT_SEED": 5}, "it lacks .* of the 120 training images .*SPLIT_SEED"),
        ({"TRAIN.FRACTION": 0.2}, "it lacks 120 of the 240 training images"),
        ({"MODEL.IMG_SIZE": 32}, r"image size 16 \(expected 32\)"),
        ({"DISTILLATION.TEACHER_IMG_SIZE": 8}, r"teacher image size 16 \(expected 8\)"),
        (
            {"CNN.DEPTH": 14, "DISTILLATION.TEACHER_WEIGHTS": "null"},
            r"teacher ResNet-8 \(expected ResNet-14\)",
        ),
    ],
)
def test_a_bank_of_another_training_is_rejected(
    bank: Path, guide_file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    renamed = {k.replace(".", "__"): v for k, v in changes.items()}
    with pytest.raises(BankError, match=f"does not match this training: .*{message}"):
        trainer.train(config(tmp_path / "out", bank, guide_file, **renamed))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_teacher_trained_further_is_rejected(
    bank: Path, guide_file: Path, tmp_path: Path
) -> None:
    state = torch.load(guide_file, weights_only=True)
    state["s3.b1.f.b.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "model.pyth")
    with pytest.raises(BankError, match=r"weights \w+... \(expected"):
        trainer.train(config(tmp_path, bank, tmp_path / "model.pyth"))


def test_a_bank_of_another_data_set_is_rejected(bank: Path, tmp_path: Path) -> None:
    guide = FeatureBank(bank, [0, 2])
    cfg = config(tmp_path, bank, None)
    dataset = builders.build_train_data(cfg)
    dataset.full.labels = np.roll(dataset.full.labels, 1)
    with pytest.raises(BankError, match=r"fingerprint \w+... \(expected"):
        builders.prepare_bank(cfg, guide, dataset, torch.device("cpu"))


def test_a_missing_bank_is_reported_with_the_fix(tmp_path: Path) -> None:
    cfg = config(tmp_path, tmp_path / "none.npz", None)
    message = rf"none\.npz', but {tmp_path}/none does not exist\. .*precompute_feature.py first"
    with pytest.raises(ConfigError, match=message):
        trainer.train(cfg)


def test_the_plain_recipe_is_equal_offline_and_online_when_all_views_are_stored(
    guide_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "bank"
    arguments = ["--cfg", str(GUIDED), "--ckpt", str(guide_file), "--out", str(bank)]
    compute(*arguments)
    with pytest.raises(ConfigError, match=r"^--shifts is 4: .* odd number from 1 to 5"):
        compute(*arguments, "--shifts", "4")
    output = capsys.readouterr().out
    assert "draws 25 views of each image and 1 are stored" in output
    assert "--shifts 5 stores all of them, in 0.04 GB" in output
    compute(*arguments, "--shifts", "5")
    assert "views of each image" not in capsys.readouterr().out
    inter = []
    for offline in (True, False):
        out_dir = tmp_path / str(offline)
        plain = {"TRAIN__STRONG_AUGMENTATION": False, "TRAIN__LABEL_SMOOTHING": 0.0}
        plain |= {"OPTIM__MAX_EPOCH": 1, "OPTIM__WARMUP_EPOCHS": 0, "LOG_PERIOD": 1}
        trainer.train(config(out_dir, bank, guide_file, DISTILLATION__OFFLINE=offline, **plain))
        steps = [line for line in stats(out_dir) if line["_type"] == "train_iter"]
        inter.append([line["inter_distill_loss"] for line in steps])
    assert len(inter[0]) == 4 and inter[0] == pytest.approx(inter[1], rel=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg", str(GUIDE), "--ckpt", "none.pyth"], "none.pyth does not exist"),
        (["--cfg", str(GUIDED), "--layers", "1"], "set by a guided config"),
        (["--cfg", str(GUIDED), "DISTILLATION.TEACHER_WEIGHTS", "null"], "give --ckpt"),
        (["--cfg", str(GUIDE), "TRAIN.DATASET", "flowers"], "r-8_digits/model.pyth does not exist"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["precompute_feature.py", *arguments])
    with pytest.raises(SystemExit, match=f"^Error: .*{message}") as stop:
        precompute_feature.main()
    assert "\n" not in str(stop.value)


def test_layers_that_the_teacher_lacks_are_rejected(guide_file: Path, tmp_path: Path) -> None:
    arguments = ["--cfg", str(GUIDE), "--ckpt", str(guide_file), "--out", str(tmp_path / "bank")]
    with pytest.raises(ConfigError, match=r"--layers \[0, 3\]: the guide has blocks 0 to 2"):
        compute(*arguments, "--layers", "0,3")


def test_a_killed_computation_ends_with_the_same_bytes(guide_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "bank"
    command = [sys.executable, str(ROOT / "precompute_feature.py"), "--cfg", str(GUIDE)]
    command += ["--ckpt", str(guide_file), "--out", str(path), "--image-size", "16"]
    command += key_values(DATA | {"TEST.BATCH_SIZE": 2})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout or ():
            if line.startswith("24 of 120"):
                process.kill()
    assert process.returncode == -9
    assert (path / "progress.json").exists() and not (path / "provenance.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    whole = tmp_path / "whole"
    compute(*command[2:7], str(whole), *command[8:10], TEST__BATCH_SIZE=2)
    assert content(path) == content(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank", "whole"]
