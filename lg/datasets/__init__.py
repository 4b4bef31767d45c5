"""Data sets: `build_dataset(name, root, split)` returns labelled images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from lg.datasets.base import ImageDataset, stratified_subset
from lg.datasets.chaoyang import Chaoyang
from lg.datasets.cifar100 import CIFAR100
from lg.datasets.digits import Digits
from lg.datasets.flowers import Flowers
from lg.datasets.image import PixelFormat
from lg.datasets.image_folder import ImageFolder
from lg.datasets.tiny_imagenet import TinyImageNet
from lg.errors import DataError

# Classes that are called with (root, split, download).
DATASETS: dict[str, Callable[..., ImageDataset]] = {
    "digits": Digits,
    "cifar100": CIFAR100,
    "flowers": Flowers,
    "tiny_imagenet": TinyImageNet,
    "chaoyang": Chaoyang,
    "image_folder": ImageFolder,
}


def build_dataset(
    name: str,
    root: str | os.PathLike[str],
    split: str,
    download: bool = False,
    tolerate: Iterable[str] = (),
    class_names: Sequence[str] | None = None,
    pixel_format: PixelFormat | None = None,
) -> ImageDataset:
    """Build one split of a data set.

    Args:
        name: A key of DATASETS.
        root: Folder that contains the set's folder; for image_folder, the set itself.
        split: train, val or test; val and test are the same if a set has one held-out split.
        download: Download missing files, for the sets that support it.
        tolerate: Kinds of faults (see `lg.datasets.base`) that are not raised; they are listed in
            the set's `faults`.
        class_names: Classes that a model knows, in its order; labels follow it. By default the
            set's own. The set may lack some of them.
        pixel_format: What images are converted to, by default RGB.

    Raises:
        DataError: There is no such set or split, or its files are missing or damaged.
    """
    if name not in DATASETS:
        raise DataError(f"data set {name!r} is unknown: choose from {', '.join(DATASETS)}")
    if split not in ("train", "val", "test"):
        raise DataError(f"split of {name} is {split!r}: set it to train, val or test")
    tolerated = set(tolerate)
    if name == "image_folder":  # with known classes it does not need its training images
        dataset: ImageDataset = ImageFolder(root, split, download, class_names)
    else:
        dataset = DATASETS[name](root, split, download)
        if class_names is not None:
            dataset.rename(class_names)
    dataset.pixel_format = pixel_format or PixelFormat()
    for fault in dataset.faults:
        if fault.kind not in tolerated:
            raise DataError(fault.text)
    return dataset
