"""Which split chooses the best epoch, what the test set is used for, and when training stops."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lg
from lg import builders, trainer
from lg.checkpoint import read_checkpoint
from lg.distributed import World
from lg.errors import ConfigError
from lg.signals import Interrupted
from lg.tools.doctor.checkup import check_config
from lg.tools.doctor.findings import DATA, FACT, NOTE, PROBLEM
from lg.tools.report import report
from tests.datasets import test_scan
from tests.run_cases import assert_same, config, final_state, stats

HELD_OUT = {"TRAIN__VAL_FRACTION": 0.25}  # 30 of 120 digits


def kinds(out_dir: Path) -> list[str]:
    return [line["_type"] for line in stats(out_dir)]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("straight")
    trainer.train(config(out_dir, None, **HELD_OUT))
    return out_dir


def test_splits_are_disjoint_and_stratified(tmp_path: Path) -> None:
    train, held_out, final = builders.fetch_data(config(tmp_path, None, **HELD_OUT), World())
    assert (len(train), len(held_out), len(final)) == (90, 30, 597)
    assert [str(each) for each in (train, held_out, final)] == [
        "digits/train",
        "digits/held-out",
        "digits/test",
    ]
    everything, test, none = builders.fetch_data(config(tmp_path, None), World())
    assert sorted([*train.indices, *held_out.indices]) == everything.indices.tolist()
    assert (len(everything), str(test), none) == (120, "digits/test", None)
    assert [(held_out.labels == k).sum() for k in range(10)] == [3] * 10
    for seed, is_same in ({"RNG_SEED": 2}, True), ({"TRAIN__SPLIT_SEED": 2}, False):
        other = builders.fetch_data(config(tmp_path, None, **HELD_OUT, **seed), World()).test
        assert np.array_equal(other.indices, held_out.indices) == is_same


def test_the_test_set_is_tested_once_with_the_best_weights(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = stats(straight)
    tests = [line for line in lines if line["_type"] in ("test_epoch", "test_ema_epoch")]
    assert len(tests) == 6 and {line["split"] for line in tests} == {"digits/held-out"}
    (final,) = [line for line in lines if line["_type"] == "final_test"]
    assert lines[-1] == final and (final["split"], final["count"]) == ("digits/test", 597)
    best = min(tests, key=lambda line: line["top1_err"])
    assert final["best_epoch"] == int(best["epoch"].split("/")[0])
    # The same as a test of model.pyth, and written by the main loop only.
    result = trainer.test(config(straight, None, **HELD_OUT))
    assert result.rates == pytest.approx({k: final[k] for k in result.rates}, abs=1e-4)
    state = read_checkpoint(straight / "model.pyth")
    assert state["progress"]["best_err"] == pytest.approx(best["top1_err"], abs=1e-4)
    capsys.readouterr()
    before = (straight / "checkpoints/model_epoch_0003.pyth").stat().st_mtime_ns
    trainer.train(config(straight, None, **HELD_OUT))  # a finished run tests nothing again
    assert (straight / "checkpoints/model_epoch_0003.pyth").stat().st_mtime_ns == before
    assert kinds(straight).count("final_test") == 1
    said = last_line(capsys)
    assert said.startswith("Finished 3 epochs. Top-1 of 30 images: last ")
    assert (
        f" The best epoch was chosen on digits/held-out, and its weights were tested once on "
        f"digits/test: top-1 {100 - result.top1_err:.2f} % of 597 images, balanced accuracy "
        in said
    )


def test_the_test_set_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, reads = builders.run.build_test_loader, []

    class Counted:
        def __init__(self, loader: Any, name: str) -> None:
            self.loader, self.name = loader, name

        def __len__(self) -> int:
            return len(self.loader)

        def __iter__(self) -> Iterator[Any]:
            reads.append(self.name)
            return iter(self.loader)

        def close(self) -> None:
            self.loader.close()

    monkeypatch.setattr(
        "lg.builders.run.build_test_loader",
        lambda cfg, dataset, *rest: Counted(build(cfg, dataset, *rest), str(dataset)),
    )
    trainer.train(config(tmp_path, None, **HELD_OUT))
    assert reads == ["digits/held-out"] * 6 + ["digits/test"]  # weights and their average


@pytest.mark.parametrize("batch", [0, 2])
def test_resume_after_a_stop_in_the_final_test_is_exact(
    straight: Path, tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_best, add, asked = trainer.test_best, trainer.TestMeter.add, []

    def counted(*args: Any) -> Any:
        asked.append(1)
        if len(asked) == batch + 1:
            signal.raise_signal(signal.SIGTERM)
        return add(*args)

    def watched(*args: Any) -> Any:
        monkeypatch.setattr(trainer.TestMeter, "add", counted)
        return test_best(*args)

    monkeypatch.setattr(trainer, "test_best", watched)
    if batch < 2:  # after the last batch, the test is finished first
        with pytest.raises(Interrupted):
            trainer.train(config(tmp_path, None, **HELD_OUT))
        assert len(asked) == batch + 1 and "final_test" not in kinds(tmp_path)
        monkeypatch.undo()
    trainer.train(config(tmp_path, None, **HELD_OUT))
    assert_same(final_state(tmp_path), final_state(straight))
    assert_same(stats(tmp_path), stats(straight))


def test_without_held_out_images_the_last_line_says_what_chose_the_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.train(config(tmp_path, None, OPTIM__MAX_EPOCH=1))
    assert last_line(capsys).endswith(
        " The best epoch was chosen on the test set, so its accuracy is optimistic."
    )
    assert "final_test" not in kinds(tmp_path)


def folder(tmp_path: Path, **changes: Any) -> Any:
    return test_scan.config(tmp_path / "set", tmp_path / "run", **changes)


def test_val_of_a_folder_chooses_and_test_is_tested_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = test_scan.make_folder(tmp_path / "set")
    shutil.copytree(root / "val", root / "test")
    cfg = folder(tmp_path, TRAIN__EARLY_STOP=5)
    trainer.train(cfg)
    said = last_line(capsys)
    assert "chosen on image_folder/val, and its weights were tested once on image_folder/t" in said
    assert "top-5" not in said
    lines = {line["_type"]: line["split"] for line in stats(tmp_path / "run") if "split" in line}
    assert lines["test_epoch"] == "image_folder/val" and lines["final_test"] == "image_folder/test"
    report(out_dirs=[str(tmp_path / "run")], out=str(tmp_path / "page.html"), opts=[])
    page = (tmp_path / "page.html").read_text()
    assert "was chosen on image_folder/val, not on image_folder/test." in page
    with pytest.raises(
        ConfigError, match=r"VAL_FRACTION is 0\.2, but .* has test/ and val/, and val/"
    ):
        trainer.train(folder(tmp_path, TRAIN__VAL_FRACTION=0.2))
    shutil.rmtree(root / "val")
    with pytest.raises(ConfigError, match=r"TRAIN\.EARLY_STOP is 5, but the test set must not"):
        trainer.train(cfg)
    cfg = folder(tmp_path, TRAIN__VAL_FRACTION=0.2, TRAIN__BATCH_SIZE=2, TRAIN__EARLY_STOP=5)
    data = builders.fetch_data(cfg, World())
    assert [str(each) for each in data][1:] == ["image_folder/held-out", "image_folder/test"]


@pytest.mark.parametrize(
    ("splits", "asked", "roles", "note"),
    [
        ("train test", "test", "test", ""),
        ("train test", "val", "test", "image_folder: {} has no val split, so test takes its place"),
        ("train val", "val", "val", ""),
        (
            "train val",
            "test",
            "val",
            "TEST.SPLIT is test, but {} has no test set: its val split is used instead, and its "
            "best accuracy is optimistic",
        ),
        ("train val test", "test", "val test", ""),
        ("train val test", "val", "val test", ""),
    ],
)
def test_no_split_of_a_folder_replaces_another_silently(
    tmp_path: Path, splits: str, asked: str, roles: str, note: str
) -> None:
    root = test_scan.make_folder(tmp_path / "set")
    shutil.copytree(root / "val", root / "test")
    for split in {"val", "test"} - set(splits.split()):
        shutil.rmtree(root / split)
    data = builders.fetch_data(folder(tmp_path, TEST__SPLIT=asked), World())
    assert [str(each) for each in data[1:] if each] == [f"image_folder/{r}" for r in roles.split()]
    assert builders.data_notes(*data) == ([note.format(root)] if note else [])


def test_val_without_test_is_no_test_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = test_scan.make_folder(tmp_path / "set")
    shutil.rmtree(root / "val/dog")
    changes = {"OPTIM__MAX_EPOCH": 1, "TRAIN__EARLY_STOP": 5, "LOG_PICTURES": True}
    cfg = folder(tmp_path, TEST__SPLIT="test", **changes)
    trainer.train(cfg)
    said = capsys.readouterr()
    missing = "Warning: image_folder/val has no images of 1 of 2 classes (dog).\n"
    assert missing in said.err and f"but {root} has no test set: its val" in said.err
    assert missing in (tmp_path / "run/log.txt").read_text()
    assert said.out.strip().endswith(
        "The best epoch was chosen on image_folder/val, and there is no test set: this result is "
        "final, and its best accuracy is optimistic."
    )
    table = (tmp_path / "run/results.csv").read_text()
    assert "test_top1_err" in table and "top5" not in table  # two classes
    assert trainer.test(cfg).count == 3
    assert f"but {root} has no test set" in capsys.readouterr().err
    facts = [each.text for each in check_config(cfg) if each.level == FACT]
    assert any(text.startswith("image_folder/val chooses the best epoch, and th") for text in facts)


def test_a_folder_without_a_test_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test_scan.make_folder(tmp_path / "split", val=0)
    (tmp_path / "split/train").rename(tmp_path / "set")  # classes only
    cfg = folder(tmp_path, TRAIN__VAL_FRACTION=0.3, TRAIN__BATCH_SIZE=2)
    found = check_config(cfg)
    assert [each.text for each in found if each.level == PROBLEM] == []
    assert (
        "image_folder/held-out chooses the best epoch, and there is no test set: its best accuracy "
        "is optimistic."
        in [each.text for each in found if (each.level, each.topic) == (FACT, DATA)]
    )
    trainer.train(cfg)
    assert "there is no test set: this result is final" in last_line(capsys)
    assert trainer.test(cfg).count == 4
    with pytest.raises(lg.errors.DataError, match=r"test is missing; .*TRAIN\.VAL_FRACTION"):
        trainer.train(folder(tmp_path))


def test_the_doctor_says_what_each_split_is_for(tmp_path: Path, guide_file: Path) -> None:
    facts = {
        "digits/held-out chooses the best epoch, and digits/test is tested once, at the end, with "
        "its weights.": HELD_OUT,
        "digits/test is tested during training and chooses the best epoch, so its best accuracy is "
        "optimistic (TRAIN.VAL_FRACTION 0).": {},
    }
    for text, changes in facts.items():
        found = check_config(config(tmp_path, guide_file, **changes))
        assert text in [each.text for each in found if (each.level, each.topic) == (FACT, DATA)]
        assert [each.text for each in found if each.level == PROBLEM] == []
        assert [each.text for each in found if (each.level, each.topic) == (NOTE, DATA)] == []


# Errors of the tests, and after which one training stops with a patience of 2.
SCRIPTS = [
    ([50.0, 40.0, 41.0, 40.0, 10.0, 9.0], 4),  # equal is not lower
    ([50.0, 51.0, 49.0, 49.5, 48.0, 50.0], 6),
    ([50.0, 60.0, 60.0, 10.0], 3),
]


@pytest.mark.parametrize(("errors", "last"), SCRIPTS)
@pytest.mark.parametrize("interrupted", [False, True])
def test_training_stops_after_tests_without_a_lower_error(
    errors: list[float],
    last: int,
    interrupted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate, script = trainer.evaluate, list(errors)

    def scripted(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        if result.count != 30:
            return result
        if interrupted and len(script) == len(errors) - 1:
            signal.raise_signal(signal.SIGTERM)  # after the second test
        return lg.metrics.EvalResult(**{**vars(result), "top1_err": script.pop(0)})

    monkeypatch.setattr(trainer, "evaluate", scripted)
    changes = {**HELD_OUT, "OPTIM__MAX_EPOCH": 6, "OPTIM__EMA_UPDATE_PERIOD": 0}
    cfg = config(tmp_path, None, **changes, TRAIN__EARLY_STOP=2)
    if interrupted:
        with pytest.raises(Interrupted):
            trainer.train(cfg)
    for _ in range(2):  # the second run has nothing left to train
        trainer.train(cfg)
    assert len(script) == len(errors) - last
    assert kinds(tmp_path).count("test_epoch") == last and kinds(tmp_path).count("final_test") == 1
    early = f"Finished {last} epochs of 6 (TRAIN.EARLY_STOP). "
    assert last_line(capsys).startswith(early if last < 6 else "Finished 6 epochs. ")
    lowest = min(errors[:last])
    assert f"best {100 - lowest:.2f} % (epoch {errors.index(lowest) + 1})" in str(
        (tmp_path / "log.txt").read_text()
    )


@pytest.mark.parametrize("change", ["class", "image", "excluded"])
def test_a_run_is_not_resumed_on_other_images(tmp_path: Path, change: str) -> None:
    root, excluded = test_scan.make_folder(tmp_path / "set"), tmp_path / "excluded.txt"
    excluded.write_text("train/cat/0.png\n")
    changes = {"TRAIN__VAL_FRACTION": 0.3, "TRAIN__EXCLUDE": excluded, "TRAIN__BATCH_SIZE": 2}
    trainer.train(folder(tmp_path, **changes, OPTIM__MAX_EPOCH=1, OPTIM__WARMUP_EPOCHS=0))
    if change == "class":  # sorted behind the other class: all labels change
        for split in ("train", "val"):
            (root / split / "cat").rename(root / split / "zebra")
        excluded.write_text("train/zebra/0.png\n")
    elif change == "image":
        shutil.copy(root / "train/dog/1.png", root / "train/dog/9.png")
    else:
        excluded.write_text("train/cat/0.png\ntrain/cat/3.png\n")
    longer = folder(tmp_path, **changes, OPTIM__WARMUP_EPOCHS=0)
    with pytest.raises(ConfigError, match="the training images, or their classes, have changed"):
        trainer.train(longer)
    trainer.train(folder(tmp_path, **changes, OPTIM__WARMUP_EPOCHS=0, TRAIN__RESUME_CHANGED=True))
    assert kinds(tmp_path / "run").count("train_epoch") == 2
