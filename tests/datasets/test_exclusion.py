"""Images that a file lists are left out of training."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import pytest

from lg import builders, trainer
from lg.builders.splits import list_train_data
from lg.datasets import build_dataset
from lg.datasets.exclusion import image_names, leave_out
from lg.distributed import World
from lg.errors import DataError
from lg.tools.doctor import doctor
from lg.tools.doctor.checkup import check_config
from lg.tools.doctor.findings import DATA, FACT, PROBLEM
from tests.datasets.test_scan import config, make_folder


def test_lists_in_csv_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "set")
    train = build_dataset("image_folder", root, "train")
    names = image_names(train, root)
    assert names[:2] == ["train/cat/0.png", "train/cat/1.png"] and len(names) == 12
    file = tmp_path / "copies"
    for text in (
        "image,copy\ntrain/cat/1.png,a\ntrain/dog/0.png,b\ntrain/cat/1.png,c\n",
        "\ufefftrain/cat/1.png\n\n./train/cat/../dog/0.png\n",
        f"{root}/train/cat/1.png\nset/train/dog/0.png\n",
    ):
        file.write_text(text)
        monkeypatch.chdir(tmp_path)
        kept = leave_out(train, file, "set" if "set/" in text else root)
        assert len(kept) == 10 and kept.indices.tolist() == [0, *range(2, 6), *range(7, 12)]
        assert {"train/cat/1.png", "train/dog/0.png"}.isdisjoint(image_names(kept, root))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train/cat/0.png\ntrain/cat/none.png\nval/cat/6.png\n",
            r"2 of its 3 images are not in image_folder/train, the first is 'train/cat/none.png'",
        ),
        ("image\n", "which lists no images: set it to ''"),
        ("\n", "which lists no images"),
        (b"\xff", "cannot be read"),
        (None, "cannot be read .*No such file"),
        ("ALL", "which lists all images of image_folder/train"),
    ],
)
def test_bad_lists(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    root = make_folder(tmp_path / "set")
    train = build_dataset("image_folder", root, "train")
    file = tmp_path / "list.txt"
    if text is not None:
        content = "\n".join(image_names(train, root)) if text == "ALL" else text
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"TRAIN\.EXCLUDE is {file}.*{message}"):
        leave_out(train, file, root)


def test_images_without_files_are_named_by_position(tmp_path: Path) -> None:
    train = build_dataset("digits", "data", "train")
    file = tmp_path / "list.txt"
    file.write_text(train.describe(7))
    assert 7 not in leave_out(train, file, "data").indices


def test_copies_of_held_out_images_are_listed_too(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "test")  # every image is a copy
    found = check_config(config(root, tmp_path / "run", TRAIN__VAL_FRACTION=0.3))
    assert {row[0] for row in found.copies} == {
        f"train/{name}/{number}.png" for name in ("cat", "dog") for number in range(6)
    }
    problems = [each.text.splitlines()[0] for each in found if each.level == PROBLEM]
    assert [text.partition(", so")[0] for text in problems] == [
        "8 of the 12 test images are identical to training images",
        "4 of the 12 test images are identical to validation images",
    ]


def test_doctor_writes_the_copies_and_training_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, file = make_folder(tmp_path / "set"), tmp_path / "lists" / "copies.csv"
    for number in range(3):  # the same content as images of train
        os.link(root / f"train/cat/{number}.png", root / f"val/cat/copy{number}.png")
    os.link(root / "train/cat/0.png", root / "train/dog/too.png")
    with pytest.raises(SystemExit):
        doctor(config(root, tmp_path / "run"), copies=str(file))
    said = " ".join(capsys.readouterr().out.split())
    assert "or write the list with --copies FILE and train with TRAIN.EXCLUDE FILE" in said
    assert f"{file}: 4 training images with copies; leave them out with TRAIN.EXCLUDE." in said
    assert list(csv.reader(file.read_text().splitlines())) == [
        ["image", "label", "copy", "copy_split", "copy_label"],
        *(
            [f"train/cat/{n}.png", "cat", f"val/cat/copy{n}.png", "validation", "cat"]
            for n in range(3)
        ),
        ["train/dog/too.png", "dog", "val/cat/copy0.png", "validation", "cat"],
    ]
    clean = config(root, tmp_path / "run", TRAIN__EXCLUDE=file, TRAIN__BALANCE="weights")
    doctor(clean, copies=str(tmp_path / "none.csv"))
    said = " ".join(capsys.readouterr().out.split())
    assert "No copies were found" in said
    assert not (tmp_path / "none.csv").exists()
    found = check_config(clean)
    assert [each.text for each in found if each.level == PROBLEM] == []
    line = f"TRAIN.EXCLUDE leaves out 4 of the 13 images of image_folder/train ({file})."
    assert line in [each.text for each in found if (each.level, each.topic) == (FACT, DATA)]
    data = builders.fetch_data(clean, World())
    assert len(data.train) == 9 and data.train.indices.tolist() == [3, 4, 5, *range(6, 12)]
    trainer.train(clean)
    assert line in capsys.readouterr().out
    held_out = config(root, tmp_path / "run", TRAIN__EXCLUDE=file, TRAIN__VAL_FRACTION=0.4)
    assert len(list_train_data(held_out)) == 5  # of 9
