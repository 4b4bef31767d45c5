"""The folder of a feature bank: `.npy` files that are mapped into memory, and their provenance.

    layer_I.npy      [n, V, C, H, W]: maps of V views of n images, one file per tapped block I
    indices.npy      [n]: the position of each row's image in its data set
    provenance.json  where the maps come from; written last, so it marks a complete bank
    progress.json    present only while the bank is being computed

Opening a bank is instant, processes share its pages, and a batch reads only its own rows. Nothing
is ever unpickled.
"""

from __future__ import annotations

import json
import mmap
import os
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lg.errors import BankError

PROVENANCE, PROGRESS, INDICES = "provenance.json", "progress.json", "indices.npy"


@dataclass(frozen=True)
class Provenance:
    """Where the maps of a bank come from.

    Attributes:
        teacher: Type of the teacher, such as `ResNet-56`.
        weights: SHA-256 of the teacher's weights.
        dataset: Name of the data set.
        split: Its split.
        count: Number of images in the whole split; the bank may hold a subset.
        fingerprint: SHA-256 of the labels and of some images.
        image_size: Side of the student's images, pixels.
        teacher_image_size: Side to which they are resized for the teacher, pixels.
        layers: Tapped blocks of the teacher.
        shapes: [C, H, W] of the maps of each block.
        dtype: `float16` or `float32`.
        resize: How images become square, see `lg.augment.preprocessing`.
        fill: Pixel of the borders of letterbox, 0 to 255 per channel; None without borders.
        views: The V stored views of each image, see `lg.augment.view.View`.
        versions: Versions of the software that computed the maps.
    """

    teacher: str
    weights: str
    dataset: str
    split: str
    count: int
    fingerprint: str
    image_size: int
    teacher_image_size: int
    layers: list[int]
    shapes: list[list[int]]
    dtype: str
    resize: str = "squash"  # also of banks that do not state it
    fill: list[float] | None = None
    views: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0, 1.0, 1.0, 0.0]])
    versions: dict[str, str] = field(default_factory=dict)

    def array_shapes(self, num_images: int) -> dict[str, tuple[int, ...]]:
        """Return the file name of each array with its shape [n, V, C, H, W]."""
        layers = zip(self.layers, self.shapes, strict=True)
        return {f"layer_{i}.npy": (num_images, len(self.views), *shape) for i, shape in layers}

    def to_json(self) -> str:
        """Return JSON text; equal values give equal text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """Parse the text of `to_json`.

        Raises:
            ValueError: The text is not JSON, or has other entries.
        """
        values = json.loads(text)
        wrong = ValueError(f"{PROVENANCE} has other entries than this version writes")
        if not isinstance(values, dict) or not set(values) <= {f.name for f in fields(cls)}:
            raise wrong
        try:
            return cls(**values)
        except TypeError:  # entries without a default are missing
            raise wrong from None


class StoredMaps(NamedTuple):
    """The content of a bank."""

    provenance: Provenance | None  # None for files of the original code
    arrays: dict[int, np.ndarray]  # block of the teacher -> [n, V, C, H, W]
    indices: np.ndarray  # [n]


def bank_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a bank: `path`, without the `.npz` that published configs write."""
    folder = Path(path).expanduser()
    return folder.with_suffix("") if folder.suffix == ".npz" else folder


def bank_path(path: str | os.PathLike[str]) -> Path:
    """Return what to open for `path`: the bank's folder, or a `.npz` file of the original code."""
    folder, file = bank_folder(path), Path(path).expanduser()
    return file if file.is_file() and not folder.is_dir() else folder


def open_bank(path: str | os.PathLike[str]) -> StoredMaps:
    """Map the arrays of a bank into memory, or load a file of the original code.

    Raises:
        BankError: The bank is missing, incomplete, truncated or inconsistent.
    """
    path = bank_path(path)
    if not path.exists():
        raise BankError(
            f"{path} does not exist. Compute the features first: python precompute_feature.py "
            "--cfg GUIDE.yaml --ckpt MODEL.pyth."
        )
    if (path / PROGRESS).exists() and not (path / PROVENANCE).exists():
        raise BankError(
            f"{path} is incomplete: computing the features was interrupted. Run the same "
            "precompute_feature.py command again; it resumes."
        )
    try:
        return _load_npz(path) if path.is_file() else _map_folder(path)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BankError(f"{path} cannot be read ({error}). Compute the features again.") from None


def release_pages(arrays: Iterable[np.ndarray]) -> None:
    """Return the pages of mapped arrays to the system's cache, so that this process stays small."""
    for array in arrays:
        if isinstance(array.base, mmap.mmap):
            array.base.madvise(mmap.MADV_DONTNEED)


def _map_folder(folder: Path) -> StoredMaps:
    provenance = Provenance.from_json((folder / PROVENANCE).read_text())
    indices = np.array(np.lib.format.open_memmap(folder / INDICES, mode="r"))
    if indices.ndim != 1 or indices.dtype != np.int64:
        raise ValueError(f"{INDICES} is {indices.dtype} of shape {indices.shape}")
    arrays: dict[int, np.ndarray] = {}
    shapes = provenance.array_shapes(len(indices)).items()
    for layer, (name, shape) in zip(provenance.layers, shapes, strict=True):
        array = np.lib.format.open_memmap(folder / name, mode="r")
        if array.shape != shape or array.dtype != provenance.dtype:
            raise ValueError(
                f"{name} is {array.dtype} of shape {array.shape}, expected {provenance.dtype} of "
                f"shape {shape}"
            )
        if isinstance(array.base, mmap.mmap):
            array.base.madvise(mmap.MADV_RANDOM)  # rows are read at random: no read-ahead
        arrays[layer] = array
    return StoredMaps(provenance, arrays, indices)


def _load_npz(path: Path) -> StoredMaps:
    """Load a file of the original code into memory: one array [n, C, H, W] per stage, in order."""
    # NpzFile, unlike np.load, opens nothing but .npz files; neither unpickles.
    with open(path, "rb") as stream, np.lib.npyio.NpzFile(stream) as archive:
        arrays = [np.asarray(archive[name]) for name in archive.files]
    if not arrays or any(a.ndim != 4 or a.dtype.kind != "f" for a in arrays):
        raise ValueError("expected float arrays with 4 dimensions only")
    counts = {len(array) for array in arrays}
    if len(counts) > 1:
        raise ValueError(f"the arrays hold {', '.join(map(str, sorted(counts)))} images")
    stages = {stage: array[:, None] for stage, array in enumerate(arrays)}
    return StoredMaps(None, stages, np.arange(counts.pop()))
