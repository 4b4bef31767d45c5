"""Data sets with one file per image, on small copies of their layouts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from lg.datasets import build_dataset
from lg.datasets.flowers import CLASS_NAMES
from lg.errors import DataError


def draw(path: Path, brightness: int) -> None:
    """Write an image that its brightness identifies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (brightness, 0, 0)).save(path, "PNG")


def brightnesses(dataset: Any) -> list[int]:
    return [dataset.image(i).getpixel((0, 0))[0] for i in range(len(dataset))]


def make_flowers(root: Path, folder: str = "flowers") -> Path:
    labels = [1, 1, 2, 102, 102, 2, 1]
    for number in range(1, 8):
        draw(root / folder / "jpg" / f"image_{number:05d}.jpg", 10 * number)
    savemat(root / folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    ids = {"trnid": [[6, 1]], "valid": [[3]], "tstid": [[7, 2, 5, 4]]}
    savemat(root / folder / "setid.mat", {k: np.array(v, np.uint16) for k, v in ids.items()})
    return root


@pytest.mark.parametrize("folder", ["flowers", "flowers-102"])
def test_flowers(tmp_path: Path, folder: str) -> None:
    make_flowers(tmp_path, folder)
    train = build_dataset("flowers", tmp_path, "train")
    assert train.labels.tolist() == [0, 1, 1] and brightnesses(train) == [10, 30, 60]
    for split in ("test", "val"):
        test = build_dataset("flowers", tmp_path, split)
        assert test.labels.tolist() == [0, 101, 101, 0] and brightnesses(test) == [20, 40, 50, 70]
    assert (test.split, test.num_classes, len(set(CLASS_NAMES))) == ("test", 102, 102)
    assert [CLASS_NAMES[i] for i in (0, 50, 76, 101)] == [
        "pink primrose", "petunia", "passion flower", "blackberry lily",
    ]  # fmt: skip
    assert train.describe(1) == str(tmp_path / folder / "jpg" / "image_00003.jpg")
    assert brightnesses(pickle.loads(pickle.dumps(train))) == [10, 30, 60]


def test_flowers_damage(tmp_path: Path) -> None:
    folder = make_flowers(tmp_path) / "flowers"
    (folder / "jpg" / "image_00003.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of its 3 images are missing.*image_00003\.jpg"):
        build_dataset("flowers", tmp_path, "train")
    savemat(folder / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[8, 4]]})
    with pytest.raises(DataError, match=r"setid\.mat: it lists image ids 4\.\.8.*labels 1\.\.7"):
        build_dataset("flowers", tmp_path, "test")
    savemat(folder / "imagelabels.mat", {"labels": [[0, 1, 1, 1, 1, 1, 1, 1]]})
    with pytest.raises(DataError, match="label of image 0 is -1"):
        build_dataset("flowers", tmp_path, "train")
    savemat(folder / "imagelabels.mat", {"other": [[1.0]]})
    with pytest.raises(DataError, match=r"imagelabels\.mat: labels cannot be read .KeyError"):
        build_dataset("flowers", tmp_path, "train")
    (folder / "imagelabels.mat").write_bytes(b"not a mat file at all" * 20)
    with pytest.raises(DataError, match=r"imagelabels\.mat: labels cannot be read"):
        build_dataset("flowers", tmp_path, "train")


def test_flowers_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Official:
        def __init__(self, root: str, split: str, download: bool) -> None:
            assert download
            make_flowers(Path(root), "flowers-102")

    monkeypatch.setattr("torchvision.datasets.Flowers102", Official)
    train = build_dataset("flowers", tmp_path, "train", download=True)
    assert train.describe(0) == str(tmp_path / "flowers" / "jpg" / "image_00001.jpg")
    (tmp_path / "flowers" / "setid.mat").unlink()
    draw(tmp_path / "flowers" / "jpg" / "image_00001.jpg", 99)
    again = build_dataset("flowers", tmp_path, "train", download=True)
    assert brightnesses(again) == [99, 30, 60], "overwritten"
    assert [path.name for path in tmp_path.iterdir()] == ["flowers"]


def make_tiny_imagenet(root: Path) -> Path:
    folder = root / "tiny-imagenet-200"
    for number, (wnid, name) in enumerate(
        [("n03", "b_0.JPEG"), ("n03", "a_1.JPEG"), ("n01", "c.JPEG")]
    ):
        draw(folder / "train" / wnid / "images" / name, 10 * number)
    (folder / "wnids.txt").write_text("n03\nn01\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tcat\n")
    rows = [("val_1.JPEG", "n01"), ("val_0.JPEG", "n03")]
    for number, (name, _) in enumerate(rows):
        draw(folder / "val" / "images" / name, 100 + number)
    annotations = "".join(f"{name}\t{wnid}\t0\t0\t62\t62\n" for name, wnid in rows)
    (folder / "val" / "val_annotations.txt").write_text(annotations)
    return folder


def test_tiny_imagenet(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    train = build_dataset("tiny_imagenet", tmp_path, "train")
    assert train.class_names == ["goldfish, Carassius auratus", "n03"]
    assert train.labels.tolist() == [0, 1, 1] and brightnesses(train) == [20, 10, 0]
    for split in ("val", "test"):
        val = build_dataset("tiny_imagenet", tmp_path, split)
        assert val.split == "val"
        assert val.labels.tolist() == [0, 1] and brightnesses(val) == [100, 101]


def test_tiny_imagenet_classes_are_sorted(tmp_path: Path) -> None:
    folder = make_tiny_imagenet(tmp_path)
    wnids = [f"n{number:02d}" for number in range(20, 10, -1)]
    (folder / "wnids.txt").write_text("\n".join(wnids))
    for number, wnid in enumerate(wnids):
        draw(folder / "train" / wnid / "images" / "a.JPEG", number)
    train = build_dataset("tiny_imagenet", tmp_path, "train")
    assert train.class_names == sorted(wnids)
    assert brightnesses(train) == list(range(9, -1, -1))


def test_tiny_imagenet_damage(tmp_path: Path) -> None:
    folder = make_tiny_imagenet(tmp_path)
    (folder / "val" / "images" / "val_0.JPEG").unlink()
    with pytest.raises(DataError, match=r"1 of its 2 images are missing.*val_0\.JPEG"):
        build_dataset("tiny_imagenet", tmp_path, "val")
    (folder / "val" / "val_annotations.txt").write_text("val_1.JPEG\tn09\t0\n")
    with pytest.raises(DataError, match=r"val_1\.JPEG to the class n09, which wnids\.txt does not"):
        build_dataset("tiny_imagenet", tmp_path, "val")
    (folder / "val" / "val_annotations.txt").write_text("\nval_1.JPEG n01\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt has a line without a second column"):
        build_dataset("tiny_imagenet", tmp_path, "val")
    (folder / "wnids.txt").write_text("n01\nn03\nn07\n")
    with pytest.raises(DataError, match=r"n07.images contains no \.JPEG file"):
        build_dataset("tiny_imagenet", tmp_path, "train")
    (folder / "wnids.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"wnids\.txt cannot be read"):
        build_dataset("tiny_imagenet", tmp_path, "train")


def make_chaoyang(root: Path, entries: Any = None) -> None:
    if entries is None:
        entries = [{"name": "train/b.JPG", "label": 3}, {"name": "train/a.JPG", "label": 0}]
    for number, name in enumerate(["train/b.JPG", "train/a.JPG", "test/c.JPG"]):
        draw(root / "chaoyang" / name, 10 * number)
    (root / "chaoyang" / "train.json").write_text(json.dumps(entries))
    test = [{"name": "test/c.JPG", "label": 2}]
    (root / "chaoyang" / "test.json").write_text(json.dumps(test))


def test_chaoyang(tmp_path: Path) -> None:
    make_chaoyang(tmp_path)
    train = build_dataset("chaoyang", tmp_path, "train")
    assert train.class_names == ["normal", "serrated", "adenocarcinoma", "adenoma"]
    assert train.labels.tolist() == [3, 0] and brightnesses(train) == [0, 10]
    for split in ("test", "val"):
        test = build_dataset("chaoyang", tmp_path, split)
        assert (test.split, test.labels.tolist(), brightnesses(test)) == ("test", [2], [20])


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "train/b.JPG", "label": 4},
        {"name": "train/b.JPG", "label": -1},
        {"name": "train/b.JPG", "label": "0"},
        {"name": "train/b.JPG", "label": True},
        {"name": "train/b.JPG"},
        {"name": "../b.JPG", "label": 0},
        {"name": "/b.JPG", "label": 0},
        {"name": 3, "label": 0},
        "train/b.JPG",
    ],
)
def test_chaoyang_bad_entry(tmp_path: Path, entry: Any) -> None:
    make_chaoyang(tmp_path, [{"name": "train/a.JPG", "label": 0}, entry])
    with pytest.raises(DataError, match=r"entry 1 of .*train\.json is .*\"label\": 0\.\.3"):
        build_dataset("chaoyang", tmp_path, "train")


def test_chaoyang_damage(tmp_path: Path) -> None:
    make_chaoyang(tmp_path, {"name": "train/a.JPG"})
    with pytest.raises(DataError, match="must contain a list"):
        build_dataset("chaoyang", tmp_path, "train")
    make_chaoyang(tmp_path, [])
    with pytest.raises(DataError, match="there are no images"):
        build_dataset("chaoyang", tmp_path, "train")
    (tmp_path / "chaoyang" / "train.json").write_text("[{")
    with pytest.raises(DataError, match="is not JSON"):
        build_dataset("chaoyang", tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "where", "remedy"),
    [
        ("flowers", "flowers/jpg", "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
        ("tiny_imagenet", "tiny-imagenet-200", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
        ("chaoyang", "chaoyang/test.json", "https://bupt-ai-cz.github.io/HSA-NRL/"),
    ],
)
def test_the_error_for_a_missing_set_has_a_remedy(
    tmp_path: Path, name: str, where: str, remedy: str
) -> None:
    with pytest.raises(DataError) as caught:
        build_dataset(name, tmp_path, "test")
    assert str(caught.value).startswith(f"{name}: {tmp_path / where} is missing; ")
    assert remedy in str(caught.value)
