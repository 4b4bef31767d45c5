"""Custom images: a folder per split that contains a folder per class, or labels in CSV files.

Layout: `root/train/CLASS/...`, and `root/val/CLASS/...`, `root/test/CLASS/...` or both, with images
at any depth below the class folder. A root without any of the three holds the classes of `train`.
In place of a folder per split there may be a file of that name, such as `root/train.csv`, with the
columns `image` (a path relative to the root) and `label`; `root/labels.csv` holds those of `train`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lg.datasets.base import EMPTY_CLASS, UNTRAINED_CLASS, Fault
from lg.datasets.files import FileDataset
from lg.datasets.label_file import is_label_file, read_labels
from lg.errors import DataError, first_few

# Formats that every build of Pillow reads, in lower case.
SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
# Names of the folder of a split, in lower case.
_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_WHOLE = "whole"  # in place of a split: a root whose images are not divided into splits
_NAME = "image_folder"
_SHOWN = 8  # suffixes or folders


class ImageFolder(FileDataset):
    """Classes are the folders of `train`, sorted; images are sorted by path within a class.

    Files with other suffixes (in any case), images outside class folders, hidden folders and
    `__MACOSX` are left out and named in `notes`; hidden files are ignored. Links to folders are
    followed. (torchvision's `make_dataset` neither ignores hidden files nor stops at link cycles,
    and sorts differently.)
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
            root: Folder in one of the layouts at the top of this file.
            split: train, val or test; if only one of val and test exists, both mean that one, and
                a note says so.
            download: Ignored.
            class_names: Classes that a model knows, in its order; by default those of `train`,
                which is then not needed. A root without splits is then listed as a whole.

        Raises:
            DataError: Folders are missing, there are no images, or a file of labels is damaged.
        """
        found = find_splits(root)
        notes = [
            f"{_NAME}: {place} is read as {name}"
            for name, place in found.items()
            if name != _WHOLE and place.is_dir() and place.name != name
        ]
        other = {"val": "test", "test": "val"}.get(split, "")
        if split not in found and other in found:
            notes.append(f"{_NAME}: {root} has no {split} split, so {other} takes its place")
            split = other
        trained = found.get("train", found.get(_WHOLE))
        is_whole = split == "train" or class_names is not None
        place = found.get(split, found.get(_WHOLE) if is_whole else None)
        if place is None or (trained is None and class_names is None):
            raise _missing(Path(root), "train" if trained is None else split)
        images = _list(place, notes)
        if class_names is None:
            class_names = list(images if place == trained else _list(trained, []))  # type: ignore[arg-type]
        class_names = list(class_names)
        faults = [
            _untrained(place, name, class_names) for name in images if name not in class_names
        ]
        faults += [_empty(place / name) for name in class_names if images.get(name) == []]
        images = {name: files for name, files in images.items() if name in class_names}
        if faults and not any(images.values()):
            raise DataError(faults[0].text)
        labels = [class_names.index(name) for name, files in images.items() for _ in files]
        paths = [path for files in images.values() for path in files]
        super().__init__(_NAME, split, class_names, labels, paths)
        self.faults += faults
        self.notes += notes


def splits_of(root: str | os.PathLike[str]) -> list[str]:
    """Return which of train, val and test a root has; none if it holds the classes themselves."""
    return [split for split in find_splits(root) if split != _WHOLE]


def find_splits(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Find the folder, or the file of labels, of each split of a root.

    A file counts if it has the columns of labels, and then comes before a folder of that split.
    Folders may be called Training, VALIDATION and the like.

    Returns:
        Split -> its place, in the order train, val, test; {"whole": place} if the images are not
        divided into splits; nothing if there is no such folder.

    Raises:
        DataError: Two places could be the same split, or the splits are one folder further down.
    """
    root = Path(root)
    folders = [each for each in sorted(root.iterdir()) if each.is_dir()] if root.is_dir() else []
    found = {}
    for split, names in _NAMES.items():
        places = [each for each in folders if each.name.lower() in names]
        if is_label_file(table := root / f"{split}.csv"):
            places = [table]
        if len(places) > 1:
            raise DataError(
                f"{_NAME}: {' and '.join(map(str, places))} could both be {split}: rename or "
                "remove one"
            )
        if places:
            found[split] = places[0]
    labels = root / "labels.csv"
    if is_label_file(labels) and not found.get("train", root).is_file():
        return {"train": labels, **found} if found else {_WHOLE: labels}
    if "train" not in found:  # then folders of other names, such as valid, may be classes
        found = {k: place for k, place in found.items() if place.name in (k, f"{k}.csv")}
    if found or not root.is_dir():
        return found
    visible = [each for each in folders if not _is_skipped(each.name)]
    if len(visible) == 1 and len(inner := find_splits(visible[0])) > 1:
        raise DataError(
            f"{_NAME}: {root} contains only the folder {visible[0].name}, which has "
            f"{', '.join(inner)}: set DATA_LOADER.ROOT to {visible[0]}"
        )
    return {_WHOLE: root} if visible or _images_in(root) else {}


def _missing(root: Path, split: str) -> DataError:
    if not root.is_dir():
        return DataError(
            f"{_NAME}: {root} is missing; set DATA_LOADER.ROOT to the folder of images"
        )
    return DataError(
        f"{_NAME}: {root / split} is missing; {root} must contain train/CLASS/... and "
        "val/CLASS/... or test/CLASS/..., or train.csv and so on with the columns image,label "
        "(there is no download); without validation and test images, TRAIN.VAL_FRACTION can hold "
        "out images of train"
    )


def _list(place: Path, notes: list[str]) -> dict[str, list[str]]:
    """Return the images of each class of a folder or a file of labels; add notes on what is left
    out."""
    if place.is_file():
        return read_labels(place)
    skipped: list[str] = []  # folders
    others: list[str] = []  # files that are not read
    names: list[str] = []
    for each in sorted(place.iterdir()):
        if each.is_dir():
            (skipped if _is_skipped(each.name) else names).append(each.name)
    strays = _images_in(place)
    if not names:
        raise _flat(place, strays)
    images = {name: _images_below(place / name, skipped, others) for name in names}
    if skipped:
        notes.append(f"{_NAME}: {place} has folders that are skipped: {first_few(skipped, _SHOWN)}")
    if strays:
        notes.append(
            f"{_NAME}: {place} has {len(strays):,} image{'s' * (len(strays) > 1)} outside the "
            f"class folders, not read: {first_few(strays, _SHOWN)}"
        )
    if others:
        notes.append(
            f"{_NAME}: {place} has {len(others):,} file{'s' * (len(others) > 1)} that "
            f"{'are' if len(others) > 1 else 'is'} not read: {_by_suffix(others)}; convert images "
            "among them to PNG or JPEG"
        )
    return images


def _flat(place: Path, images: Sequence[str]) -> DataError:
    if not images:
        return DataError(f"{_NAME}: {place} contains no folders; create one folder per class in it")
    split = next((each for each, names in _NAMES.items() if place.name.lower() in names), None)
    table = place.parent / f"{split}.csv" if split else place / "labels.csv"
    return DataError(
        f"{_NAME}: {place} contains {len(images):,} image{'s' * (len(images) > 1)} but no class "
        "folders: move the images of each class into a folder of its own, such as "
        f"{place / 'CLASS' / images[0]}, or list them in {table} with the columns image,label"
    )


def _untrained(place: Path, name: str, class_names: Sequence[str]) -> Fault:
    return Fault(
        UNTRAINED_CLASS,
        f"{_NAME}: {place} has the class {name!r}, which is not among those trained "
        f"({first_few(class_names, 10)}); "
        f"remove or rename the {'folder' if place.is_dir() else 'label'}",
    )


def _empty(folder: Path) -> Fault:
    return Fault(
        EMPTY_CLASS,
        f"{_NAME}: {folder} contains no images ({' '.join(SUFFIXES)}); add some or remove the "
        "folder",
    )


def _is_skipped(name: str) -> bool:
    """Tell whether a folder is hidden, or holds the metadata that macOS adds to zip files."""
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _images_in(folder: Path) -> list[str]:
    """Return the names of the images directly in a folder."""
    files = (each.name for each in folder.iterdir() if each.is_file())
    return sorted(name for name in files if not name.startswith(".") and _is_image(name))


def _images_below(folder: Path, skipped: list[str], others: list[str]) -> list[str]:
    """Return the images at any depth below a folder; add to the skipped folders and other files."""
    files: list[str] = []
    visited: set[str] = set()  # links may form cycles
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        skipped += [os.path.join(place, each) for each in sorted(folders) if _is_skipped(each)]
        folders[:] = [each for each in folders if not _is_skipped(each)]
        for name in names:
            if not name.startswith("."):
                (files if _is_image(name) else others).append(os.path.join(place, name))
    return sorted(files)


def _by_suffix(files: Sequence[str]) -> str:
    """Count files by suffix, with an example of each, the most frequent first."""
    suffixes = [os.path.splitext(file)[1].lower() for file in files]
    example = dict(zip(reversed(suffixes), reversed(files), strict=True))  # the first of each
    counted = [
        f"{count:,} {suffix or 'without suffix'} (such as {example[suffix]})"
        for suffix, count in Counter(suffixes).most_common()
    ]
    return first_few(counted, _SHOWN)
