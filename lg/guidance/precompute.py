"""Compute a teacher's feature maps of a whole data set into the folder of a feature bank, once.

The arrays are written in place. An interrupted run resumes after the rows recorded in
`progress.json`; the same teacher, data and machine give the same bytes, interrupted or not.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lg.augment.view import BLACK, View, shifted
from lg.datasets.loader import Batch
from lg.errors import BankError
from lg.files.atomic import TEMPORARY, remove_leftovers, write_atomically, write_text
from lg.guidance.bank_file import INDICES, PROGRESS, PROVENANCE, Provenance
from lg.guidance.teacher import FrozenTeacher

_SAVE_PERIOD = 5.0  # seconds between two records of the progress
_OWN_FILE = re.compile(
    rf"layer_\d+\.npy|{INDICES}|{PROGRESS}|{PROVENANCE}|{re.escape(TEMPORARY)}.*"
)


def bank_size(provenance: Provenance, num_images: int) -> int:
    """Return the size of the maps of `num_images` images, bytes."""
    values = sum(map(math.prod, provenance.array_shapes(num_images).values()))
    return values * np.dtype(provenance.dtype).itemsize


def check_space(folder: Path, provenance: Provenance, num_images: int) -> str:
    """Check that a bank can be written to `folder`; return a line with its size.

    Raises:
        BankError: The disk is too full, or the path belongs to something else.
    """
    if folder.exists() and not folder.is_dir():
        raise BankError(f"{folder} is a file; features are stored in a folder. Set another --out.")
    files = list(folder.iterdir()) if folder.exists() else []
    if foreign := [file.name for file in files if not _OWN_FILE.fullmatch(file.name)]:
        raise BankError(
            f"{folder} holds other files ({', '.join(sorted(foreign)[:3])}). Set --out to a new "
            "folder."
        )
    size, present = bank_size(provenance, num_images), sum(file.stat().st_size for file in files)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if size - present > free:
        raise BankError(
            f"{folder} needs {size / 1e9:.2f} GB, but {folder.parent} has {free / 1e9:.2f} GB "
            "left. Free some space, set --out to another disk, or store float16."
        )
    needed = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
    return f"{folder}: {needed} ({free / 1e9:.1f} GB free)"


def precompute(
    teacher: FrozenTeacher,
    make_batches: Callable[[int], Iterable[Batch]],
    *,
    folder: Path,
    provenance: Provenance,
    indices: np.ndarray,
    device: torch.device,
    black: Sequence[float] = BLACK,
) -> None:
    """Compute the maps that are missing and complete the bank.

    Files of a bank with another provenance or other images are replaced.

    Args:
        teacher: The model, on `device`.
        make_batches: Given the number of images done, returns the batches of the others, in order
            and not augmented. That number is always the end of a batch.
        folder: The bank.
        provenance: Where the maps come from.
        indices: [n], the position of each image in its data set, in the order of the batches.
        device: Where the teacher is.
        black: The normalised values of a black pixel, per channel.

    Raises:
        BankError: A map does not fit the stored type.
    """
    arrays, done = _resume(folder, provenance, indices)
    if done:
        print(f"Resuming after {done:,} of {len(indices):,} images.", flush=True)
    else:
        arrays = _begin(folder, provenance, indices)
    saved = time.monotonic()
    with tqdm(total=len(indices), initial=done, unit=" images", disable=None) as bar:
        for batch in make_batches(done) if done < len(indices) else ():
            images = batch.images.to(device)
            begin, done = done, done + len(images)
            for position, view in enumerate(provenance.views):
                maps, _ = teacher(shifted(images, View._make(view), black))
                for array, layer_maps in zip(arrays, maps, strict=True):
                    array[begin:done, position] = _convert(layer_maps, array.dtype)
            bar.update(len(images))
            if bar.disable and 10 * done // len(indices) > 10 * begin // len(indices):
                print(f"{done:,} of {len(indices):,} images", flush=True)
            if time.monotonic() - saved > _SAVE_PERIOD:
                _save_progress(folder, arrays, provenance, done)
                saved = time.monotonic()
    assert done == len(indices), f"{done} maps of {len(indices)} images"
    _save_progress(folder, arrays, provenance, done)
    write_text(folder / PROVENANCE, provenance.to_json())
    (folder / PROGRESS).unlink()
    for name in (INDICES, PROGRESS, PROVENANCE):
        remove_leftovers(folder / name)


def _resume(
    folder: Path, provenance: Provenance, indices: np.ndarray
) -> tuple[list[np.memmap], int]:
    """Open the arrays of an earlier run on the same inputs; return them and the rows done."""
    try:
        if (folder / PROVENANCE).exists():
            text, done = (folder / PROVENANCE).read_text(), len(indices)
        else:
            progress = json.loads((folder / PROGRESS).read_text())
            text, done = progress["provenance"], int(progress["done"])
        same_images = np.array_equal(np.load(folder / INDICES), indices)
        if not done or text != provenance.to_json() or not same_images:
            return [], 0
        arrays = []
        for name, shape in provenance.array_shapes(len(indices)).items():
            arrays.append(np.lib.format.open_memmap(folder / name, mode="r+"))
            if arrays[-1].shape != shape or arrays[-1].dtype != provenance.dtype:
                return [], 0
    except (OSError, ValueError, KeyError, TypeError):
        return [], 0  # nothing to resume, or damaged
    return arrays, done


def _begin(folder: Path, provenance: Provenance, indices: np.ndarray) -> list[np.memmap]:
    """Create the files of a bank; unlink older ones, which running trainings may have mapped."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    _save_progress(folder, [], provenance, 0)
    write_atomically(folder / INDICES, lambda file: np.save(file, indices.astype(np.int64)))
    arrays = []
    for name, shape in provenance.array_shapes(len(indices)).items():
        dtype = np.dtype(provenance.dtype)
        arrays.append(np.lib.format.open_memmap(folder / name, mode="w+", dtype=dtype, shape=shape))
        _reserve(folder / name)
    return arrays


def _reserve(file: Path) -> None:
    """Allocate a file's disk space now: writing to a mapped file on a full disk kills the
    process without a message."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with open(file, "r+b") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(error.errno, error.strerror, str(file)) from None


def _convert(maps: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """Convert maps to the stored type."""
    values = maps.float().cpu().numpy()
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        raise BankError(
            f"the guide's maps reach {np.abs(values).max():.3g}, which {dtype} cannot hold. Set "
            "--dtype float32, or check the guide's weights."
        )
    return stored


def _save_progress(
    folder: Path, arrays: list[np.memmap], provenance: Provenance, done: int
) -> None:
    """Flush the rows done so far to the disk, then record their number."""
    for array in arrays:
        array.flush()
    text = json.dumps({"done": done, "provenance": provenance.to_json()})
    write_text(folder / PROGRESS, text)
