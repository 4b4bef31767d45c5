"""Image sets: `build_dataset(name, root, split)` gives labelled RGB images."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable

from lg.datasets.base import ImageDataset, stratified_subset
from lg.datasets.chaoyang import Chaoyang
from lg.datasets.cifar100 import CIFAR100
from lg.datasets.digits import Digits
from lg.datasets.flowers import Flowers
from lg.datasets.image_folder import ImageFolder
from lg.datasets.tiny_imagenet import TinyImageNet
from lg.errors import DataError

__all__ = ["DATASETS", "ImageDataset", "build_dataset", "stratified_subset"]

# Each is a class, called as (root, split, download).
DATASETS: dict[str, Callable[..., ImageDataset]] = {
    "digits": Digits,
    "cifar100": CIFAR100,
    "flowers": Flowers,
    "tiny_imagenet": TinyImageNet,
    "chaoyang": Chaoyang,
    "image_folder": ImageFolder,
}


def build_dataset(
    name: str, root: str | os.PathLike[str], split: str, download: bool = False
) -> ImageDataset:
    """One split of the set called `name`.

    Args:
        name: a key of DATASETS.
        root: folder that holds the set's own folder; for image_folder, the set itself.
        split: train, val or test; val and test are the same where a set has one held-out split.
        download: fetch missing files, for the sets that can.

    Raises:
        DataError: there is no such set or split, or its files are missing or damaged.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(str(name).lower(), DATASETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise DataError(f"data set {name!r} is unknown: {hint}There are {', '.join(DATASETS)}")
    return DATASETS[name](root, split, download)
