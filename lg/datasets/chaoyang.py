"""Chaoyang: 512 x 512 patches of colon slides in 4 classes, with noisy training labels.

Layout: images in `chaoyang/{train,test}/` and `chaoyang/{train,test}.json`, a list of
`{"name": "train/xxx.JPG", "label": 0..3}` with names relative to `chaoyang/`.
Source: Zhu et al., Hard Sample Aware Noise Robust Learning for Histopathology Image
Classification (IEEE TMI 2021), https://bupt-ai-cz.github.io/HSA-NRL/
"""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath

from lg.datasets.files import FileDataset, read_text, require
from lg.errors import DataError

FOLDER = "chaoyang"
ADDRESS = "https://bupt-ai-cz.github.io/HSA-NRL/"
CLASS_NAMES = ("normal", "serrated", "adenocarcinoma", "adenoma")


class Chaoyang(FileDataset):
    """4,021 training or 2,139 test images if complete, in the order of the JSON file."""

    def __init__(self, root: str | os.PathLike[str], split: str, download: bool = False) -> None:
        """List a split.

        Args:
            root: Folder that contains `chaoyang`.
            split: train, or test (also called val).
            download: Ignored: the authors provide the data on request.

        Raises:
            DataError: Files are missing or the JSON file is invalid.
        """
        name = "chaoyang"
        split = "train" if split == "train" else "test"
        folder = Path(root) / FOLDER
        remedy = (
            f"request the data at {ADDRESS} (there is no automatic download) and unpack it in "
            f"{root}, which then contains {FOLDER}/train/, {FOLDER}/test/, {FOLDER}/train.json and "
            f"{FOLDER}/test.json"
        )
        require([folder / f"{split}.json", folder / split], name, remedy)
        entries = _read_entries(folder / f"{split}.json", name)
        labels = [label for _, label in entries]
        paths = [str(folder / file) for file, _ in entries]
        super().__init__(name, split, CLASS_NAMES, labels, paths)


def _read_entries(path: Path, name: str) -> list[tuple[str, int]]:
    """Read (path relative to the folder of the JSON file, label) of each image."""
    try:
        entries = json.loads(read_text(path, name))
    except json.JSONDecodeError as error:
        raise DataError(f"{name}: {path} is not JSON ({error}); unpack it again") from error
    expected = f'{{"name": "{path.stem}/xxx.JPG", "label": 0..{len(CLASS_NAMES) - 1}}}'
    if not isinstance(entries, list):
        raise DataError(f"{name}: {path} must contain a list of {expected}")
    for number, entry in enumerate(entries):
        if not _is_entry(entry):
            raise DataError(f"{name}: entry {number} of {path} is {entry!r}, not {expected}")
    return [(entry["name"], entry["label"]) for entry in entries]


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    file, label = entry.get("name"), entry.get("label")
    if not isinstance(file, str) or type(label) is not int:
        return False
    inside = not PurePosixPath(file).is_absolute() and ".." not in PurePosixPath(file).parts
    return inside and 0 <= label < len(CLASS_NAMES)
