"""Custom images: a folder per split that contains a folder per class.

Layout: `root/train/CLASS/...`, and `root/val/CLASS/...`, `root/test/CLASS/...` or both, with images
at any depth below the class folder. A root without any of the three holds the classes of `train`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lg.datasets.base import EMPTY_CLASS, UNTRAINED_CLASS, Fault
from lg.datasets.files import FileDataset, require
from lg.errors import DataError

# Formats that every build of Pillow reads, in lower case.
SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)


class ImageFolder(FileDataset):
    """Classes are the folders of `train`, sorted; images are sorted by path within a class.

    Hidden files and folders, files with other suffixes (in any case) and files outside class
    folders are ignored. Links to folders are followed. (torchvision's `make_dataset` neither
    ignores hidden files nor stops at link cycles, and sorts differently.)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        download: bool = False,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """List a split.

        Args:
            root: Folder that contains `train` and one or both of `val` and `test`, or only classes.
            split: train, val or test; if only one of val and test exists, both mean that one.
            download: Ignored.
            class_names: Classes that a model knows, in its order; by default the folders of
                `train`, which is then not needed. A root without splits holds the classes then.

        Raises:
            DataError: Folders are missing or there are no images.
        """
        name = "image_folder"
        splits = splits_of(root)
        other = {"val": "test", "test": "val"}.get(split)
        if split not in splits and other in splits:
            split = other
        trained = Path(root, "train") if splits or not _has_folders(root) else Path(root)
        folder = trained if split == "train" else Path(root, split)
        if class_names is not None and not splits and _has_folders(root):
            folder = trained = Path(root)
        remedy = (
            f"{root} must contain train/CLASS/... and val/CLASS/... or test/CLASS/... (there is no "
            "download); without the latter two, TRAIN.VAL_FRACTION can hold out images of train"
        )
        require([folder] if class_names is not None else [trained, folder], name, remedy)
        present = _class_folders(folder)
        class_names = list(class_names or _class_folders(trained))
        faults: list[Fault] = []
        labels: list[int] = []
        paths: list[str] = []
        for class_name in present:
            if class_name not in class_names:
                text = (
                    f"{name}: {folder} has the class {class_name!r}, which is not among those "
                    f"trained ({', '.join(class_names[:10])}{', ...' * (len(class_names) > 10)}); "
                    "remove or rename the folder"
                )
                faults.append(Fault(UNTRAINED_CLASS, text))
                continue
            files = _images_below(folder / class_name)
            if not files:
                text = (
                    f"{name}: {folder / class_name} contains no images "
                    f"({' '.join(SUFFIXES)}); add some or remove the folder"
                )
                faults.append(Fault(EMPTY_CLASS, text))
            labels += [class_names.index(class_name)] * len(files)
            paths += files
        if faults and not paths:
            raise DataError(faults[0].text)
        super().__init__(name, split, class_names, labels, paths)
        self.faults += faults


def splits_of(root: str | os.PathLike[str]) -> list[str]:
    """Return which of train, val and test a root has; none if it holds the classes themselves."""
    return [split for split in ("train", "val", "test") if Path(root, split).is_dir()]


def _has_folders(root: str | os.PathLike[str]) -> bool:
    return any(each.is_dir() for each in Path(root).iterdir()) if Path(root).is_dir() else False


def _class_folders(folder: Path) -> list[str]:
    entries = folder.iterdir() if folder.is_dir() else []
    names = sorted(each.name for each in entries if each.is_dir() and each.name[0] != ".")
    if not names:
        raise DataError(
            f"image_folder: {folder} contains no folders; create one folder per class in it"
        )
    return names


def _images_below(folder: Path) -> list[str]:
    files: list[str] = []
    visited: set[str] = set()  # links may form cycles
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
    return sorted(files)
