"""Folders of the user's own images: layouts, labels in CSV files, and what is left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lg.datasets import build_dataset
from lg.datasets.image_folder import splits_of
from lg.errors import DataError
from tests.datasets.test_file_sets import brightnesses, draw


def make_folder(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        draw(root / name, 10 * number)


def test_image_folder(tmp_path: Path) -> None:
    make_folder(
        tmp_path,
        ["train/dog/b.PNG", "train/dog/deep/er/a.jpeg", "train/cat/x.Tiff", "val/dog/y.png",
         "train/.git/z.png", "train/dog/.hidden.png", "train/dog/.trash/z.png",
         "train/dog/notes.txt", "train/stray.png", "train/dog/z.png"],
    )  # fmt: skip
    train = build_dataset("image_folder", tmp_path, "train")
    assert train.class_names == ["cat", "dog"] and train.labels.tolist() == [0, 1, 1, 1]
    assert brightnesses(train) == [20, 0, 10, 90], "not sorted by path"
    for split in ("val", "test"):
        held_out = build_dataset("image_folder", tmp_path, split)
        assert (held_out.split, held_out.labels.tolist()) == ("val", [1])
        assert held_out.class_names == ["cat", "dog"]
    make_folder(tmp_path, ["test/cat/z.png"])
    assert build_dataset("image_folder", tmp_path, "test").labels.tolist() == [0]
    assert build_dataset("image_folder", tmp_path, "val").labels.tolist() == [1]


def test_a_folder_of_classes_is_the_training_split(tmp_path: Path) -> None:
    make_folder(tmp_path, ["dog/a.png", "cat/b.png", "dog/c.png"])
    train = build_dataset("image_folder", tmp_path, "train")
    assert (train.class_names, train.labels.tolist()) == (["cat", "dog"], [0, 1, 1])
    assert brightnesses(train) == [10, 0, 20] and splits_of(tmp_path) == []
    with pytest.raises(DataError, match=r"test is missing; .* TRAIN\.VAL_FRACTION can hold out"):
        build_dataset("image_folder", tmp_path, "test")


def test_image_folder_links(tmp_path: Path) -> None:
    make_folder(tmp_path, ["elsewhere/a.png", "train/dog/b.png"])
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "dog" / "circle").symlink_to(tmp_path / "train" / "dog")
    (tmp_path / "train" / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    train = build_dataset("image_folder", tmp_path, "train")
    assert train.labels.tolist() == [0, 1, 1] and brightnesses(train) == [0, 10, 0]


def test_image_folder_damage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train is missing; .* must contain train/CLASS"):
        build_dataset("image_folder", tmp_path, "train")
    make_folder(tmp_path, ["train/dog/a.png", "test/dog/a.png", "test/wolf/a.png"])
    with pytest.raises(
        DataError, match=r"test has the class 'wolf', which is not among those trained \(dog\)"
    ):
        build_dataset("image_folder", tmp_path, "val")
    os.makedirs(tmp_path / "train" / "wolf")
    with pytest.raises(DataError, match=r"wolf contains no images .*\.webp"):
        build_dataset("image_folder", tmp_path, "train")
    with pytest.raises(DataError, match=r"split of image_folder is 'dev': set it to train, val"):
        build_dataset("image_folder", tmp_path, "dev")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="one folder per class"):
        build_dataset("image_folder", tmp_path / "empty", "train")


def test_the_error_for_a_damaged_image_names_it(tmp_path: Path) -> None:
    make_folder(tmp_path, ["train/dog/a.png", "train/dog/b.png"])
    (tmp_path / "train" / "dog" / "b.png").write_bytes(b"")
    train = build_dataset("image_folder", tmp_path, "train")
    assert train.image(0).size == (4, 3)
    with pytest.raises(DataError, match=r"b\.png: the image file is empty"):
        train.image(1)


def test_files_that_are_not_read_are_counted_by_suffix(tmp_path: Path) -> None:
    make_folder(
        tmp_path,
        ["train/cat/a.png", "train/dog/b.png", "train/__MACOSX/cat/._a.png", "train/.cache/c.png",
         "train/dog/.cache/d.png", "train/stray.png", "val/cat/x.png"],
    )  # fmt: skip
    for name in ("cat/1.heic", "cat/2.HEIC", "dog/notes.txt", "dog/scan", "cat/.DS_Store"):
        (tmp_path / "train" / name).write_bytes(b"x")
    train = build_dataset("image_folder", tmp_path, "train")
    assert train.class_names == ["cat", "dog"] and brightnesses(train) == [0, 10]
    folder = tmp_path / "train"
    assert train.notes == [
        f"image_folder: {folder} has folders that are skipped: .cache, __MACOSX, "
        f"{folder}/dog/.cache",
        f"image_folder: {folder} has 1 image outside the class folders, not read: stray.png",
        f"image_folder: {folder} has 4 files that are not read: 2 .heic (such as "
        f"{folder}/cat/1.heic), 1 .txt (such as {folder}/dog/notes.txt), 1 without suffix (such "
        f"as {folder}/dog/scan); convert images among them to PNG or JPEG",
    ]
    assert build_dataset("image_folder", tmp_path, "val").notes == []


def test_other_names_of_splits(tmp_path: Path) -> None:
    make_folder(tmp_path, ["Training/cat/a.png", "Training/dog/b.png", "TEST/dog/c.png"])
    train = build_dataset("image_folder", tmp_path, "train")
    assert (train.class_names, train.split, brightnesses(train)) == (
        ["cat", "dog"],
        "train",
        [0, 10],
    )
    test = build_dataset("image_folder", tmp_path, "test")
    assert (test.split, brightnesses(test), splits_of(tmp_path)) == (
        "test",
        [20],
        ["train", "test"],
    )
    assert f"image_folder: {tmp_path}/Training is read as train" in train.notes
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"Training and .*train could both be train: rename or"):
        build_dataset("image_folder", tmp_path, "train")
    make_folder(tmp_path / "own", ["valid/a.png", "invalid/b.png"])  # classes
    assert build_dataset("image_folder", tmp_path / "own", "train").class_names == [
        "invalid",
        "valid",
    ]


def test_a_missing_split_is_replaced_with_a_note(tmp_path: Path) -> None:
    make_folder(tmp_path, ["train/cat/a.png", "test/cat/b.png"])
    assert build_dataset("image_folder", tmp_path, "test").notes == []
    assert build_dataset("image_folder", tmp_path, "val").notes == [
        f"image_folder: {tmp_path} has no val split, so test takes its place"
    ]


@pytest.mark.parametrize(
    ("names", "where", "table"),
    [
        (["train/a.png", "train/b.png", "test/c.png"], "train", "train.csv"),
        (["Training/a.png", "Training/b.png"], "Training", "train.csv"),
        (["a.png", "b.png"], "", "labels.csv"),
    ],
)
def test_images_without_class_folders(
    tmp_path: Path, names: list[str], where: str, table: str
) -> None:
    make_folder(tmp_path, names)
    with pytest.raises(DataError) as caught:
        build_dataset("image_folder", tmp_path, "train")
    assert f"{tmp_path / where} contains 2 images but no class folders: " in str(caught.value)
    assert f"such as {tmp_path / where}/CLASS/a.png" in str(caught.value)
    assert f"list them in {tmp_path}/{table} with the columns image,label" in str(caught.value)


def test_a_folder_around_the_set_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, ["set/train/cat/a.png", "set/test/cat/b.png", "__MACOSX/set/._a.png"])
    with pytest.raises(DataError, match=rf"set DATA_LOADER\.ROOT to {tmp_path}/set"):
        build_dataset("image_folder", tmp_path, "train")
    with pytest.raises(DataError, match=r"nowhere is missing; set DATA_LOADER\.ROOT to the folder"):
        build_dataset("image_folder", tmp_path / "nowhere", "train")


def test_labels_in_csv_files(tmp_path: Path) -> None:
    make_folder(tmp_path, ["photos/b.png", "photos/a.png", "photos/c.png", "train/p1/d.png"])
    (tmp_path / "train.csv").write_text(
        "\ufeffid,label,image\n7,dog,photos/b.png\n8, cat ,photos/a.png\n9,dog,train/p1/d.png\n"
    )
    (tmp_path / "test.csv").write_text("image,label\nphotos/c.png,dog\n")
    train = build_dataset("image_folder", tmp_path, "train")
    assert (train.class_names, train.labels.tolist()) == (["cat", "dog"], [0, 1, 1])
    assert brightnesses(train) == [10, 0, 30]
    test = build_dataset("image_folder", tmp_path, "test")
    assert (test.class_names, test.labels.tolist(), brightnesses(test)) == (
        ["cat", "dog"],
        [1],
        [20],
    )
    assert splits_of(tmp_path) == ["train", "test"]
    (tmp_path / "test.csv").write_text("image,label\nphotos/c.png,elk\n")
    with pytest.raises(DataError, match=r"test\.csv has the class 'elk', .* rename the label"):
        build_dataset("image_folder", tmp_path, "test")


def test_one_csv_file_for_all_images(tmp_path: Path) -> None:
    make_folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / "labels.csv").write_text("image,label\na.png,1\nb.png,0\n")
    train = build_dataset("image_folder", tmp_path, "train")
    assert (train.class_names, brightnesses(train), splits_of(tmp_path)) == (
        ["0", "1"],
        [10, 0],
        [],
    )
    known = build_dataset("image_folder", tmp_path, "test", class_names=["1", "0"])
    assert known.labels.tolist() == [1, 0]  # as a whole
    make_folder(tmp_path, ["test/0/c.png"])
    assert splits_of(tmp_path) == ["train", "test"]
    assert brightnesses(build_dataset("image_folder", tmp_path, "train")) == [10, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\na.png,\n", r"train\.csv: row 2 has no label: add it or remove the row"),
        ("image,label\na.png,x\n\n,x\n", r"train\.csv: row 3 has no image"),
        ("image,label\na.png,x\na.png,y\n", r"rows 2 and 3 list the same image, .*a\.png"),
        ("image,label\n", r"train\.csv lists no images"),
        ("image,label\nb.png,x\n", r"1 of its 1 images are missing, the first is .*b\.png"),
        (b"image,label\n\xff.png,x\n", r"train\.csv cannot be read .*: save it as CSV in UTF-8"),
        ("image;label\na.png;x\n", r"contains 1 image but no class folders.*columns image,label"),
    ],
)
def test_damaged_csv_files(tmp_path: Path, text: Any, message: str) -> None:
    make_folder(tmp_path, ["a.png"])
    (tmp_path / "train.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        build_dataset("image_folder", tmp_path, "train")
