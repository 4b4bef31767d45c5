"""Sets of one file per image, and how files of a set are found, missed and fetched."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lg.datasets.base import MISSING, ImageDataset, found_fault
from lg.datasets.image import open_rgb
from lg.errors import DataError


class FileDataset(ImageDataset):
    """A set of one file per image.

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
        """Keep the paths; the files are looked up in their folders, but not opened.

        Raises:
            DataError: as `ImageDataset`, or there are files missing.
        """
        super().__init__(name, split, class_names, labels)
        assert len(paths) == len(self.labels)
        self.paths = list(paths)
        self._check_files()

    def image(self, index: int) -> Image.Image:
        return open_rgb(self.paths[index])

    def describe(self, index: int) -> str:
        return self.paths[index]

    def _check_files(self) -> None:
        # One listing a folder: cheaper than one look-up a file where the disk is across a network.
        wanted = Counter(os.path.dirname(path) for path in self.paths)
        present = {os.path.join(folder, name) for folder in wanted for name in _listing(folder)}
        missing = [path for path in self.paths if path not in present]
        if missing:
            found_fault(
                MISSING,
                f"{self.name}, split {self.split!r}: {len(missing)} of its {len(self)} images are "
                f"missing, the first is {missing[0]}; unpack the data set again",
            )


def _listing(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


def require(paths: Sequence[Path], name: str, remedy: str) -> None:
    """Check that files and folders are there.

    Args:
        paths: of the files and folders.
        name: of the set, for the message.
        remedy: what to fetch and where to put it.

    Raises:
        DataError: one is missing; the message says which, and the remedy.
    """
    for path in paths:
        if not path.exists():
            raise DataError(f"{name}: {path} is missing; {remedy}")


def read_text(path: Path, name: str) -> str:
    """The text of a list that belongs to a set, UTF-8.

    Raises:
        DataError: it cannot be read or is no text.
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
    """Put the missing `entries` of a downloaded set into `folder`.

    The download happens in a folder of its own beside `folder`: what is there already is never
    overwritten, and an interrupted download leaves nothing that looks whole. With several
    processes, let one of them do this and the others wait.

    Args:
        download: called with an empty folder; writes the set into it.
        source: folder below that one which then holds the entries.
        folder: where they are to go.
        entries: names of files and folders.
        name: of the set, for the message.

    Raises:
        DataError: the download failed, or did not hold an entry.
    """
    missing = [entry for entry in entries if not (folder / entry).exists()]
    if not missing:
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In the same file system, so that a rename, which cannot stop half-way, is all it takes.
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-download-", dir=folder.parent
        ) as staging:
            download(Path(staging))
            folder.mkdir(exist_ok=True)
            for entry in missing:
                os.rename(Path(staging, source, entry), folder / entry)
    except (OSError, RuntimeError) as error:  # no network, full disk, a checksum that differs
        raise DataError(
            f"{name}: the download into {folder} failed ({error}); check network and disk, or "
            "fetch the files by hand and set download=False"
        ) from error
