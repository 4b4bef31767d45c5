"""Data sets with one file per image, and how their files are checked and downloaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lg.datasets.base import MISSING, Fault, ImageDataset
from lg.errors import DataError


class FileDataset(ImageDataset):
    """A data set with one file per image.

    Attributes:
        paths: n paths, in the order of the labels.
    """

    def __init__(
        self,
        name: str,
        split: str,
        class_names: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        paths: Sequence[str],
    ) -> None:
        """Store the paths and check that the files exist, without opening them.

        Raises:
            DataError: As `ImageDataset`.
        """
        super().__init__(name, split, class_names, labels)
        assert len(paths) == len(self.labels)
        self.paths = list(paths)
        # Listing each folder once is faster than a lookup per file, above all on network drives.
        folders = filter(os.path.isdir, {os.path.dirname(path) for path in paths})
        present = {os.path.join(folder, file) for folder in folders for file in os.listdir(folder)}
        missing = [path for path in self.paths if path not in present]
        if missing:
            text = (
                f"{name}, split {split!r}: {len(missing)} of its {len(self)} images are missing, "
                f"the first is {missing[0]}; unpack the data set again"
            )
            self.faults.append(Fault(MISSING, text))

    def image(self, index: int) -> Image.Image:
        return self.pixel_format.open(self.paths[index])

    def describe(self, index: int) -> str:
        return self.paths[index]


def require(paths: Sequence[Path], name: str, remedy: str) -> None:
    """Check that files and folders exist.

    Args:
        paths: The files and folders.
        name: Name of the set, for the message.
        remedy: What to download and where to put it.

    Raises:
        DataError: One is missing; the message names it and the remedy.
    """
    for path in paths:
        if not path.exists():
            raise DataError(f"{name}: {path} is missing; {remedy}")


def read_text(path: Path, name: str) -> str:
    """Read a UTF-8 text file of a set.

    Raises:
        DataError: It cannot be read or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name}: {path} cannot be read ({error}); unpack the data set again"
        ) from error


def fetch(
    download: Callable[[Path], object], source: str, folder: Path, entries: Sequence[str], name: str
) -> None:
    """Download the missing `entries` of a set into `folder`.

    The download goes to a temporary folder beside `folder`: existing files are never overwritten,
    and an interrupted download leaves nothing behind. With several processes, let one of them
    download while the others wait.

    Args:
        download: Called with an empty folder; writes the set into it.
        source: Folder below it that then contains the entries.
        folder: Destination of the entries.
        entries: Names of files and folders.
        name: Name of the set, for the message.

    Raises:
        DataError: The download failed or lacks an entry.
    """
    missing = [entry for entry in entries if not (folder / entry).exists()]
    if not missing:
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system, so that a rename, which is atomic, moves each entry.
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-download-", dir=folder.parent
        ) as staging:
            download(Path(staging))
            folder.mkdir(exist_ok=True)
            for entry in missing:
                os.rename(Path(staging, source, entry), folder / entry)
    except (OSError, RuntimeError) as error:  # no network, full disk, checksum mismatch
        raise DataError(
            f"{name}: the download into {folder} failed ({error}); check network and disk, or "
            "download the files manually and set download=False (DATA_LOADER.DOWNLOAD False)"
        ) from error
