"""Leave out images that a file lists, such as training images that are in the test set too."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

from lg.datasets.base import DatasetSubset, ImageDataset
from lg.datasets.files import FileDataset
from lg.errors import DataError


def image_names(dataset: ImageDataset, root: str | os.PathLike[str]) -> list[str]:
    """Name each image: its path relative to `root`, or its position in the set's file."""
    full = dataset.full
    if not isinstance(full, FileDataset):
        return [dataset.describe(position) for position in range(len(dataset))]
    start = os.path.abspath(root)
    return [os.path.relpath(os.path.abspath(full.paths[i]), start) for i in dataset.indices]


def read_excluded(path: str | os.PathLike[str]) -> list[str]:
    """Read the names of a list of images, each once.

    Args:
        path: A CSV file with the column `image`, or a text file with one name per line.

    Raises:
        DataError: The file cannot be read or lists nothing.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"TRAIN.EXCLUDE is {path}, which cannot be read ({error}): name a CSV file with the "
            "column image, or a text file with one path per line"
        ) from error
    if "image" in next(csv.reader(lines), []):
        lines = [row["image"] or "" for row in csv.DictReader(lines)]
    names = list(dict.fromkeys(filter(None, map(str.strip, lines))))
    if not names:
        raise DataError(f"TRAIN.EXCLUDE is {path}, which lists no images: set it to ''")
    return names


def leave_out(
    dataset: ImageDataset, path: str | os.PathLike[str], root: str | os.PathLike[str]
) -> ImageDataset:
    """Return a set without the images that a file lists; indices in the full set do not change.

    Args:
        dataset: The set.
        path: A file for `read_excluded`. Paths are relative to `root`, or to the working directory.
        root: Folder of the images.

    Raises:
        DataError: The file cannot be read, lists images that the set does not have, or all of them.
    """
    names = read_excluded(path)
    position = {name: number for number, name in enumerate(image_names(dataset, root))}
    chosen, unknown = [], []
    for name in names:
        ways = (name, os.path.normpath(name), os.path.relpath(os.path.abspath(name), root))
        found = next((position[way] for way in ways if way in position), None)
        if found is None:
            unknown.append(name)
        else:
            chosen.append(found)
    if unknown:
        raise DataError(
            f"TRAIN.EXCLUDE is {path}; {len(unknown):,} of its {len(names):,} images are not in "
            f"{dataset}, the first is {unknown[0]!r}: give paths relative to {root}, as --mode "
            "doctor --copies writes them"
        )
    kept = np.delete(np.arange(len(dataset)), chosen)
    if not len(kept):
        raise DataError(f"TRAIN.EXCLUDE is {path}, which lists all images of {dataset}")
    return DatasetSubset(dataset, kept)
