"""Labels in CSV files: a row per image, with its path and its class."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from lg.errors import DataError

COLUMNS = ("image", "label")


def is_label_file(path: Path) -> bool:
    """Tell whether a file exists and its first row names the columns `image` and `label`."""
    if not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            return set(COLUMNS) <= set(next(csv.reader(file), []))
    except (OSError, csv.Error):
        return False


def read_labels(path: Path) -> dict[str, list[str]]:
    """Read the images of each class, both in sorted order.

    Args:
        path: A file for which `is_label_file` holds. Columns other than `image` and `label` are
            ignored. Paths of images are relative to its folder.

    Raises:
        DataError: The file cannot be read, a row lacks a path or a label, or an image is listed
            twice.
    """
    images: defaultdict[str, list[str]] = defaultdict(list)
    row_of: dict[str, int] = {}  # image -> its row
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                image, label = ((row[column] or "").strip() for column in COLUMNS)
                if not image or not label:
                    missing = "image" if not image else "label"
                    raise DataError(
                        f"{path}: row {number} has no {missing}: add it or remove the row"
                    )
                image = str(path.parent / image)
                if image in row_of:
                    raise DataError(
                        f"{path}: rows {row_of[image]} and {number} list the same image, {image}: "
                        "remove one of them"
                    )
                row_of[image] = number
                images[label].append(image)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}): save it as CSV in UTF-8") from error
    if not images:
        raise DataError(f"{path} lists no images: add a row for each image")
    return {label: sorted(images[label]) for label in sorted(images)}
