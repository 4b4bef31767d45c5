"""Your own images: a folder per split, in it a folder per class.

Layout: `root/train/CLASS/...` and `root/val/CLASS/...` or `root/test/CLASS/...`, images at any
depth below the class's folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from lg.datasets.base import EMPTY_CLASS, UNTRAINED_CLASS, found_fault, resolve_split
from lg.datasets.files import FileDataset, require
from lg.errors import DataError

# What Pillow reads in every build, in lower case.
SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)


class ImageFolder(FileDataset):
    """Classes are the folders of `train`, sorted; images are sorted by path within a class.

    Hidden files and folders, files of other suffixes (in any case) and files beside the class
    folders are no images of the set. Links to folders are followed.
    """

    def __init__(self, root: str | os.PathLike[str], split: str, download: bool = False) -> None:
        """List a split.

        Args:
            root: folder that holds `train` and one or both of `val` and `test`.
            split: train, val or test; of the last two, the other one if that alone is there.
            download: there is nothing to fetch.

        Raises:
            DataError: folders are missing, a class folder holds no image, or a class is not among
                the training ones.
        """
        name = "image_folder"
        allowed = {"train": "train", "val": "val", "test": "test"}
        split = resolve_split(name, split, allowed)
        other = {"val": "test", "test": "val"}.get(split, split)
        folder = Path(root)
        if not (folder / split).is_dir() and (folder / other).is_dir():
            split = other
        remedy = (
            f"{root} must hold train/CLASS/... and val/CLASS/... or test/CLASS/... (there is no "
            "download)"
        )
        require([folder / "train", folder / split], name, remedy)
        class_names = _class_folders(folder / "train")
        present = class_names if split == "train" else _class_folders(folder / split)
        known = set(class_names)
        for each in present:
            if each not in known:
                found_fault(
                    UNTRAINED_CLASS,
                    f"{name}: {folder / split} has the class {each!r} which {folder / 'train'} "
                    "has not; a model cannot learn it, remove or rename the folder",
                )
        labels: list[int] = []
        paths: list[str] = []
        for each in filter(known.__contains__, present):
            files = _images_below(folder / split / each)
            labels += [class_names.index(each)] * len(files)
            paths += files
        super().__init__(name, split, class_names, labels, paths)


def _class_folders(folder: Path) -> list[str]:
    entries = folder.iterdir() if folder.is_dir() else []
    names = sorted(each.name for each in entries if each.is_dir() and each.name[0] != ".")
    if not names:
        raise DataError(f"image_folder: {folder} holds no folders; make one folder per class in it")
    return names


def _images_below(folder: Path) -> list[str]:
    files: list[str] = []
    visited: set[str] = set()  # links can lead in circles
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        folders[:] = [each for each in folders if not each.startswith(".")]
        files += [
            os.path.join(place, each)
            for each in names
            if not each.startswith(".") and os.path.splitext(each)[1].lower() in SUFFIXES
        ]
    if not files:
        found_fault(
            EMPTY_CLASS,
            f"image_folder: {folder} holds no image ({' '.join(SUFFIXES)}); add some or "
            "remove the folder",
        )
    return sorted(files)
