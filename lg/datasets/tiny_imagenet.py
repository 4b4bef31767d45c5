"""Tiny ImageNet: 64 x 64 images of 200 ImageNet classes, or of those listed in wnids.txt.

Layout: `tiny-imagenet-200/` with `wnids.txt`, `words.txt`, `train/WNID/images/*.JPEG`,
`val/images/` and `val/val_annotations.txt`.
Source: Stanford CS231n, http://cs231n.stanford.edu/tiny-imagenet-200.zip
"""

from __future__ import annotations

import os
from pathlib import Path

from lg.datasets.files import FileDataset, read_text, require
from lg.errors import DataError

FOLDER = "tiny-imagenet-200"
ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


class TinyImageNet(FileDataset):
    """The training (500 per class if complete) or validation images (50 per class).

    The official test images have no labels, so both val and test mean the validation images.

    Attributes:
        wnids: The K WordNet ids in the order of the labels, which is alphabetical.
    """

    def __init__(self, root: str | os.PathLike[str], split: str, download: bool = False) -> None:
        """List a split.

        Args:
            root: Folder that contains `tiny-imagenet-200`.
            split: train, or val (also called test).
            download: Ignored: there is no automatic download.

        Raises:
            DataError: Files are missing or inconsistent.
        """
        name = "tiny_imagenet"
        split = "train" if split == "train" else "val"
        folder = Path(root) / FOLDER
        remedy = (
            f"unpack {ADDRESS} in {root}, which then contains {FOLDER}/ with wnids.txt, words.txt, "
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
    """Read the first two columns of a tab-separated file."""
    lines = read_text(path, name).splitlines()
    cells = [line.split("\t") for line in lines if line.strip()]
    try:
        return [(first.strip(), second.strip()) for first, second, *_ in cells]
    except ValueError as error:
        raise DataError(
            f"{name}: {path} has a line without a second column; unpack the data set again"
        ) from error


def _train_files(folder: Path, wnids: list[str], name: str) -> tuple[list[int], list[str]]:
    labels: list[int] = []
    paths: list[str] = []
    for label, wnid in enumerate(wnids):
        images = folder / wnid / "images"
        files = sorted(images.glob("[!.]*.JPEG"))
        if not files:
            raise DataError(
                f"{name}: {images} contains no .JPEG file, but wnids.txt lists {wnid}; unpack "
                "the data set again, or remove the line from wnids.txt"
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
                f"{name}: val_annotations.txt assigns {file} to the class {wnid}, which wnids.txt "
                "does not list; unpack the data set again, or add the class to wnids.txt"
            )
    return [label_of[wnid] for _, wnid in rows], [str(folder / "images" / f) for f, _ in rows]
