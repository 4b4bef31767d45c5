"""Tiny ImageNet: 64 x 64 images of 200 ImageNet classes, or of those that wnids.txt lists.

Layout: `tiny-imagenet-200/` with `wnids.txt`, `words.txt`, `train/WNID/images/*.JPEG`,
`val/images/` and `val/val_annotations.txt`.
Source: Stanford CS231n, http://cs231n.stanford.edu/tiny-imagenet-200.zip
"""

from __future__ import annotations

import os
from pathlib import Path

from lg.datasets.base import resolve_split
from lg.datasets.files import FileDataset, read_text, require
from lg.errors import DataError

FOLDER = "tiny-imagenet-200"
ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


class TinyImageNet(FileDataset):
    """The training (500 a class if complete) or validation images (50 a class).

    The official test images have no labels, so val is the held-out split under both names.

    Attributes:
        wnids: the K WordNet ids in label order, which is their alphabetical one.
    """

    def __init__(self, root: str | os.PathLike[str], split: str, download: bool = False) -> None:
        """List a split.

        Args:
            root: folder that holds `tiny-imagenet-200`.
            split: train; val or its other name test.
            download: there is no automatic download; with files missing, the error says what to do.

        Raises:
            DataError: files are missing or do not fit together.
        """
        name = "tiny_imagenet"
        split = resolve_split(name, split, {"train": "train", "val": "val", "test": "val"})
        folder = Path(root) / FOLDER
        remedy = (
            f"unpack {ADDRESS} in {root}, which then holds {FOLDER}/ with wnids.txt, words.txt, "
            "train/WNID/images/*.JPEG, val/images and val/val_annotations.txt (there is no "
            "automatic download)"
        )
        require([folder, folder / "wnids.txt", folder / "words.txt", folder / split], name, remedy)
        self.wnids = sorted(set(read_text(folder / "wnids.txt", name).split()))
        words = dict(_rows(folder / "words.txt", name))
        if split == "train":
            labels, paths = _train_files(folder / "train", self.wnids, name)
        else:
            require([folder / "val" / "val_annotations.txt"], name, remedy)
            labels, paths = _val_files(folder / "val", self.wnids, name)
        class_names = [words.get(wnid, wnid) for wnid in self.wnids]
        super().__init__(name, split, class_names, labels, paths)


def _rows(path: Path, name: str) -> list[tuple[str, str]]:
    """The first two columns of a table of tabs."""
    rows = []
    for number, line in enumerate(read_text(path, name).splitlines(), start=1):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) < 2:
            raise DataError(
                f"{name}: line {number} of {path} is {line!r}, without a second column; unpack "
                "the data set again"
            )
        rows.append((cells[0].strip(), cells[1].strip()))
    return rows


def _train_files(folder: Path, wnids: list[str], name: str) -> tuple[list[int], list[str]]:
    labels: list[int] = []
    paths: list[str] = []
    for label, wnid in enumerate(wnids):
        images = folder / wnid / "images"
        files = sorted(images.glob("[!.]*.JPEG"))
        if not files:
            raise DataError(
                f"{name}: {images} holds no .JPEG file, but wnids.txt lists {wnid}; unpack the "
                "data set again, or take the line out of wnids.txt"
            )
        labels += [label] * len(files)
        paths += [str(file) for file in files]
    return labels, paths


def _val_files(folder: Path, wnids: list[str], name: str) -> tuple[list[int], list[str]]:
    rows = _rows(folder / "val_annotations.txt", name)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    for file, wnid in rows:
        if wnid not in label_of:
            raise DataError(
                f"{name}: val_annotations.txt gives {file} the class {wnid}, which wnids.txt does "
                "not list; both must be of the same classes"
            )
    return [label_of[wnid] for _, wnid in rows], [str(folder / "images" / f) for f, _ in rows]
