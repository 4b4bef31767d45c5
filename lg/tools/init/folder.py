"""Look at a folder of images: its splits, classes and image sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lg.datasets import build_dataset
from lg.datasets.base import ImageDataset
from lg.datasets.image_folder import SUFFIXES, splits_of
from lg.errors import DataError

# Names of split folders in lower case -> the names that the image_folder data set reads.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_NUM_SAMPLES = 24  # images whose sizes are looked at


@dataclass(frozen=True)
class ImageFacts:
    """What a folder of images holds.

    Attributes:
        root: The folder to train from, absolute.
        class_names: K names.
        sizes: Training images of each class [K], before any are held out.
        splits: Images of each split that exists: train and, where present, val and test.
        side: Median of the shorter sides of some training images, pixels.
        notes: Lines about what was found or arranged.
    """

    root: Path
    class_names: list[str]
    sizes: list[int]
    splits: dict[str, int]
    side: int
    notes: list[str] = field(default_factory=list)

    @property
    def val_fraction(self) -> float:
        """Share of the training images to hold out: none if val/ and test/ choose and test."""
        if {"val", "test"} <= self.splits.keys():
            return 0.0
        return 0.1 if len(self.splits) > 1 else 0.2

    @property
    def num_train(self) -> int:
        """Images that are trained on."""
        count = sum(self.sizes)
        return count - round(self.val_fraction * count)

    @property
    def is_imbalanced(self) -> bool:
        """Whether the largest class has more than 1.5 times the images of the smallest."""
        return max(self.sizes) > 1.5 * min(self.sizes)

    @property
    def are_symbols(self) -> bool:
        """Whether the classes look like digits or letters, which must not be mirrored."""
        names = [name.lower() for name in self.class_names]
        return all(len(name) == 1 for name in names) or any(
            side in name.replace("-", "_").split("_") for name in names for side in _SIDES
        )


_SIDES = ("left", "right")


def look(data: str, arranged: Path) -> ImageFacts:
    """Look at a folder of images.

    Args:
        data: The folder: train/, and val/ and test/ or one of them, in any spelling, or classes.
        arranged: Where links to split folders of other names are put, if there are any.

    Raises:
        DataError: It is no folder of class folders with images.
    """
    root = Path(data).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"--data {data} is not a folder: give one with a folder per class.")
    notes: list[str] = []
    inner = _unwrap(root)
    if inner != root:
        notes.append(f"The images are in {inner}.")
    _check_layout(inner)
    root = _arrange(inner, arranged, notes)
    present = splits_of(root) or ["train"]
    if "train" not in present:
        raise DataError(
            f"{root} has {' and '.join(f'{name}/' for name in present)} but no train/: name the "
            "folder of the training images train."
        )
    sets = {split: build_dataset("image_folder", str(root), split) for split in present}
    train = sets["train"]
    sizes = np.bincount(train.labels, minlength=train.num_classes).tolist()
    if train.num_classes < 2:
        raise DataError(
            f"{root} has one class ({train.class_names[0]}): give a folder with at least two."
        )
    counts = {split: len(dataset) for split, dataset in sets.items()}
    return ImageFacts(root, train.class_names, sizes, counts, _median_side(train), notes)


def _folders(root: Path) -> list[Path]:
    """Return the folders in a folder, without hidden ones and those that macOS adds."""
    inside = (each for each in root.iterdir() if each.is_dir())
    return sorted(each for each in inside if each.name[0] != "." and each.name != "__MACOSX")


def _unwrap(root: Path) -> Path:
    """Return the folder below a chain of folders that contain nothing but the next one."""
    while len(inside := _folders(root)) == 1 and _split(inside[0]) is None:
        if not _folders(inside[0]):
            break
        root = inside[0]
    return root


def _split(folder: Path) -> str | None:
    return _SPLITS.get(folder.name.lower())


def _check_layout(root: Path) -> None:
    """Reject a folder without folders, and one that mixes splits with classes."""
    inside = _folders(root)
    images = [each for each in root.iterdir() if each.suffix.lower() in SUFFIXES]
    if not inside:
        found = f"{len(images):,} images" if images else "no folders and no images"
        raise DataError(
            f"{root} has {found} but no folder per class: move the images of each class into a "
            f"folder with the name of the class, such as {root.name}/cat/1.jpg."
        )
    splits = {_split(each): each.name for each in inside if _split(each)}
    names = [each.name for each in inside if _split(each)]
    if len(names) > len(splits):
        raise DataError(f"{root} has several folders for one split ({', '.join(names)}): keep one.")


def _arrange(root: Path, arranged: Path, notes: list[str]) -> Path:
    """Return a root whose splits are named train, val and test: `root`, or a folder of links."""
    splits = {split: each for each in _folders(root) if (split := _split(each))}
    if all(each.name == split for split, each in splits.items()):
        return root
    arranged.mkdir(parents=True, exist_ok=True)
    for split, each in splits.items():
        link = arranged / split
        if link.is_symlink() or link.exists():
            if os.path.realpath(link) != str(each):
                raise DataError(f"{link} exists and is not {each}: remove it.")
        else:
            link.symlink_to(each, target_is_directory=True)
    names = ", ".join(f"{split} -> {each.name}" for split, each in splits.items())
    notes.append(f"Split folders have the names train, val and test: links in {arranged} ({names})")
    return arranged.resolve()


def _median_side(dataset: ImageDataset) -> int:
    """Return the median of the shorter sides of some images; unreadable ones are left out."""
    sides = []
    for index in np.linspace(0, len(dataset) - 1, min(_NUM_SAMPLES, len(dataset))).astype(int):
        try:
            sides.append(min(dataset.image(int(index)).size))
        except DataError:
            continue
    if not sides:
        raise DataError(f"None of {_NUM_SAMPLES} images of {dataset} can be read.")
    return int(np.median(sides))
