"""Computes a guide's feature maps of a whole data set into a file, once.

The maps grow in a folder beside the file (`NAME.partial/`), from which a run that was killed goes
on; they are packed into the file at the end, which appears whole or not at all. The same guide,
data and machine give the same bytes, killed or not.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from tqdm import tqdm

from lg.augment.view import View, shifted
from lg.datasets.loader import Batch
from lg.errors import BankError
from lg.files.atomic import remove_leftovers, write_atomically
from lg.guidance.bank_file import INDICES, PROVENANCE, Provenance
from lg.guidance.teacher import FrozenTeacher

_PROGRESS = "progress.json"
_SAVE_PERIOD = 5.0  # seconds between notes of how far it is
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the time in every entry: the same bytes whenever it runs


class Progress:
    """How far it is: a bar on a terminal, a line for every tenth otherwise."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._bar = tqdm(total=total, unit=" images", disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text)

    def advance(self, count: int) -> None:
        """Some more images are done."""
        tenths = 10 * self.done // self.total
        self.done += count
        self._bar.update(count)
        if self._bar.disable and 10 * self.done // self.total > tenths:
            print(f"{self.done:,} of {self.total:,} images", flush=True)


def bank_size(provenance: Provenance, count: int) -> int:
    """Bytes that the maps of `count` images take."""
    values = sum(int(np.prod(shape)) for shape in provenance.array_shapes(count))
    return values * np.dtype(provenance.dtype).itemsize


def check_space(path: Path, provenance: Provenance, count: int) -> str:
    """Says how much disk space it takes; the maps exist twice while they are packed.

    Raises:
        BankError: There is not enough.
    """
    size = bank_size(provenance, count)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    have = sum(f.stat().st_size for f in _folder(path).glob("*")) if _folder(path).exists() else 0
    if 2 * size - have > free:
        raise BankError(
            f"{path} takes {size / 1e9:.2f} GB, twice that while it is written, but only "
            f"{free / 1e9:.2f} GB are free in {path.parent}; make room, write it elsewhere with "
            "--out, or store float16."
        )
    return f"{path}: {size / 1e9:.2f} GB, twice that while it is written ({free / 1e9:.1f} GB free)"


def precompute(
    guide: FrozenTeacher,
    make_batches: Callable[[int], Iterable[Batch]],
    *,
    path: Path,
    provenance: Provenance,
    indices: np.ndarray,
    device: torch.device,
    say: Callable[[str], None],
    advance: Callable[[int], None],
) -> None:
    """Computes what is still missing, then writes the file.

    Args:
        guide: Frozen, on `device`.
        make_batches: From the number of images that are done to the batches of the others, in
            order and without views; the number is one that batches end at.
        path: The file.
        provenance: Goes into the file; a begun folder of another one is started afresh.
        indices: [n], the place of each image in its data set, in the order of the batches.
        device: Where the guide is.
        say: Takes lines for the user.
        advance: Takes the number of images done since the last call.

    Raises:
        BankError: Maps that do not fit the type they are stored in.
    """
    folder = _folder(path)
    arrays, done = _begin(folder, provenance, len(indices))
    if done:
        say(f"Going on after {done:,} of {len(indices):,} images.")
        advance(done)
    noted = time.monotonic()
    for batch in make_batches(done) if done < len(indices) else ():
        images = batch.images.to(device)
        for position, view in enumerate(provenance.views):
            maps, _ = guide(shifted(images, View._make(view)))
            for array, layer_maps in zip(arrays, maps, strict=True):
                array[done : done + len(images), position] = _stored(layer_maps, array.dtype)
        done += len(batch.images)
        advance(len(batch.images))
        if time.monotonic() - noted > _SAVE_PERIOD:
            _note(folder, arrays, provenance, done)
            noted = time.monotonic()
    assert done == len(indices), f"{done} maps of {len(indices)} images"
    _note(folder, arrays, provenance, done)
    remove_leftovers(path)
    write_atomically(path, lambda stream: _pack(stream, folder, provenance, indices))
    shutil.rmtree(folder)


def _folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _begin(folder: Path, provenance: Provenance, count: int) -> tuple[list[np.memmap], int]:
    """The arrays in the folder, and how many of their rows are done."""
    done = 0
    try:
        progress = json.loads((folder / _PROGRESS).read_text())
        if progress["provenance"] == provenance.to_json() and progress["count"] == count:
            done = int(progress["done"])
        shapes = provenance.array_shapes(count)
        for name, shape in zip(provenance.array_names(), shapes, strict=True):
            if np.lib.format.open_memmap(folder / name, mode="r").shape != tuple(shape):
                done = 0
    except (OSError, ValueError, KeyError, TypeError):
        done = 0  # nothing begun, or nothing to trust
    if not done and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    shapes = provenance.array_shapes(count)
    for name, shape in zip(provenance.array_names(), shapes, strict=True):
        file = folder / name
        if done:
            arrays.append(np.lib.format.open_memmap(file, mode="r+"))
        else:
            dtype = np.dtype(provenance.dtype)
            arrays.append(np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape))
            _reserve(file)
    return arrays, done


def _reserve(file: Path) -> None:
    """Takes the room on the disk now: where it runs out later, writing into mapped memory ends the
    process without a word."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with open(file, "r+b") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(error.errno, error.strerror, str(file)) from None


def _stored(maps: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """Maps in the type of the file."""
    values = maps.float().cpu().numpy()
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        raise BankError(
            f"the guide's maps reach {np.abs(values).max():.3g}, which {dtype} cannot hold; store "
            "them with --dtype float32, or check the guide's weights."
        )
    return stored


def _note(folder: Path, arrays: list[np.memmap], provenance: Provenance, done: int) -> None:
    """Makes the rows so far durable, then notes how many they are."""
    for array in arrays:
        array.flush()
    progress = {"provenance": provenance.to_json(), "count": len(arrays[0]), "done": done}
    write_atomically(folder / _PROGRESS, lambda stream: stream.write(json.dumps(progress).encode()))


def _pack(stream: IO[bytes], folder: Path, provenance: Provenance, indices: np.ndarray) -> None:
    """Writes the parts of a bank, uncompressed, in one order."""
    np.save(folder / INDICES, indices.astype(np.int64))
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(zipfile.ZipInfo(PROVENANCE, _EPOCH), provenance.to_json())
        for name in (INDICES, *provenance.array_names()):
            info = zipfile.ZipInfo(name, _EPOCH)
            with open(folder / name, "rb") as part, archive.open(info, "w", force_zip64=True) as to:
                shutil.copyfileobj(part, to, 1 << 20)
