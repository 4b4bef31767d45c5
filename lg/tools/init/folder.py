"""Look at a folder of images: its splits, classes and image sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from timm.data import IMAGENET_DEFAULT_MEAN

from lg.datasets import build_dataset
from lg.datasets.base import ImageDataset
from lg.datasets.image_folder import splits_of
from lg.errors import DataError

_NUM_SAMPLES = 24  # images whose sizes are looked at


@dataclass(frozen=True)
class FolderFacts:
    """What a folder of images holds.

    Attributes:
        root: The folder to train from, absolute.
        class_names: K names.
        sizes: Training images of each class [K], before any are held out.
        splits: Images of each split that exists: train and, where present, val and test.
        side: Median of the shorter sides of some training images, pixels.
        is_unusual: Whether brightness or contrast are far from those of photographs.
        notes: Lines about what was found or arranged.
    """

    root: Path
    class_names: list[str]
    sizes: list[int]
    splits: dict[str, int]
    side: int
    is_unusual: bool = False
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
        return round((1 - self.val_fraction) * sum(self.sizes))  # as `hold_out` rounds

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


def look(data: str) -> FolderFacts:
    """Look at a folder of images.

    Args:
        data: The folder, in one of the layouts of the image_folder data set, perhaps below folders
            that contain nothing else.

    Raises:
        DataError: It holds no images in classes, or no training images.
    """
    root = Path(data).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"--data {data} is not a folder: give one with a folder per class.")
    notes: list[str] = []
    inner = _unwrap(root)
    if inner != root:
        notes.append(f"The images are in {inner}.")
        root = inner
    sets = {
        each: build_dataset("image_folder", root, each) for each in splits_of(root) or ["train"]
    }
    if "train" not in sets:
        raise DataError(
            f"{root} has {' and '.join(sets)} but no train: give the folder of the training images "
            "that name."
        )
    train = sets["train"]
    if train.num_classes < 2:
        raise DataError(
            f"{root} has one class ({train.class_names[0]}): give a folder with at least two."
        )
    sizes = np.bincount(train.labels, minlength=train.num_classes).tolist()
    counts = {split: len(dataset) for split, dataset in sets.items()}
    notes += dict.fromkeys(note for dataset in sets.values() for note in dataset.notes)
    side, is_unusual = _sample(train)
    return FolderFacts(root, train.class_names, sizes, counts, side, is_unusual, notes)


def _unwrap(root: Path) -> Path:
    """Return the folder below a chain of folders that contain nothing but the next one."""
    while not _has_splits(root):
        inside = [each for each in sorted(root.iterdir()) if each.is_dir()]
        inside = [each for each in inside if each.name[0] != "." and each.name != "__MACOSX"]
        if len(inside) != 1 or not any(each.is_dir() for each in inside[0].iterdir()):
            break
        root = inside[0]
    return root


def _has_splits(root: Path) -> bool:
    try:
        return bool(splits_of(root))
    except DataError:  # they are one folder further down
        return False


def _sample(dataset: ImageDataset) -> tuple[int, bool]:
    """Look at some images that can be read: return `side` and `is_unusual` of `FolderFacts`."""
    sides, means, deviations = [], [], []
    for index in np.linspace(0, len(dataset) - 1, min(_NUM_SAMPLES, len(dataset))).astype(int):
        try:
            image = dataset.image(int(index))
        except DataError:
            continue
        pixels = np.asarray(image.resize((32, 32)), np.float32) / 255
        sides.append(min(image.size))
        means.append(pixels.mean(axis=(0, 1)))
        deviations.append(pixels.std(axis=(0, 1)))
    if not sides:
        raise DataError(f"None of {_NUM_SAMPLES} images of {dataset} can be read.")
    far = np.abs(np.mean(means, axis=0) - IMAGENET_DEFAULT_MEAN).max() > 0.2
    flat = np.mean(deviations) < 0.1  # of photographs: about 0.22
    return int(np.median(sides)), bool(far or flat)
