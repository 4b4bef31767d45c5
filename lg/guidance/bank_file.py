"""The file of a feature bank: an uncompressed `.npz` whose arrays are mapped where they lie.

It holds `layer_I.npy` [n, V, C, H, W] for each tapped block I of the guide, with the maps of V
views of each image; `indices.npy` [n] with the place of each row's image in its data set; and
`provenance.json`. Opening it is instant, processes share its pages, and a batch touches what it
needs. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO

import numpy as np

from lg.errors import BankError

PROVENANCE = "provenance.json"
INDICES = "indices.npy"
_LOCAL_HEADER = 30  # bytes before the name in a zip entry; the lengths of name and extra end it


@dataclass(frozen=True)
class Provenance:
    """Where the maps of a bank come from.

    Attributes:
        guide: The guide's type, such as `ResNet-56`.
        weights: SHA-256 of its weights.
        dataset: Name of the data set.
        split: Part of it.
        count: Images of the whole split, of which the bank may hold some.
        fingerprint: SHA-256 of the set's labels and of some of its images.
        image_size: Side of the students' images, pixels.
        guide_image_size: Side to which the guide saw them resized, pixels.
        layers: Blocks of the guide, in the order of the arrays.
        shapes: [C, H, W] of each.
        dtype: `float16` or `float32`.
        views: The V views of each image that the guide saw, see `lg.augment.view.View`.
        versions: Of what computed it.
    """

    guide: str
    weights: str
    dataset: str
    split: str
    count: int
    fingerprint: str
    image_size: int
    guide_image_size: int
    layers: list[int]
    shapes: list[list[int]]
    dtype: str
    views: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0, 1.0, 1.0, 0.0]])
    versions: dict[str, str] = field(default_factory=dict)

    def array_names(self) -> list[str]:
        """Files of the arrays, in their order."""
        return [f"layer_{layer}.npy" for layer in self.layers]

    def array_shapes(self, count: int) -> list[tuple[int, ...]]:
        """[n, V, C, H, W] of the arrays for `count` images."""
        return [(count, len(self.views), *shape) for shape in self.shapes]

    def to_json(self) -> str:
        """The same text for the same values."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """The inverse of `to_json`.

        Raises:
            ValueError: It is not what `to_json` writes.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {f.name for f in fields(cls)}:
            raise ValueError("the provenance has other entries than this version writes")
        return cls(**values)


@dataclass(frozen=True)
class _Entry:
    """Where the bytes of one part of the file lie."""

    offset: int
    size: int


class BankFile:
    """A feature file, open for reading.

    Attributes:
        path: Where it is.
        names: Its parts, in their order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Maps the file into memory and finds its parts.

        Raises:
            BankError: Missing, truncated, compressed, or no such file at all.
        """
        self.path = Path(path)
        try:
            with open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
                infos = archive.infolist()
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise BankError(
                f"{path} does not exist. Compute the features first: python precompute_feature.py "
                "--cfg GUIDE.yaml --ckpt MODEL.pyth, or name the file as DISTILLATION.FEATURE_FILE."
            ) from None
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise self.error(f"is no whole feature file ({error}); precompute it again") from None
        packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise self.error(
                f"is compressed ({', '.join(packed[:3])}), so it cannot be mapped into memory; "
                "write it again with numpy.savez, or precompute it"
            )
        self._entries = {info.filename: self._locate(info) for info in infos}
        self.names = list(self._entries)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)  # batches are drawn at random: do not read ahead

    def error(self, text: str) -> BankError:
        """A fault of this file."""
        return BankError(f"{self.path} {text}.")

    def provenance(self) -> Provenance | None:
        """Where the maps come from, if the file says so.

        Raises:
            BankError: It says so in a way that this version does not read.
        """
        if PROVENANCE not in self._entries:
            return None
        entry = self._entries[PROVENANCE]
        try:
            text = self._map[entry.offset : entry.offset + entry.size].decode()
            return Provenance.from_json(text)
        except (ValueError, TypeError) as error:
            raise self.error(f"cannot be read: {error}; precompute it again") from None

    def array(self, name: str, *, dims: int, kind: str) -> np.ndarray:
        """One array where it lies.

        Args:
            name: A part.
            dims: Its dimensions.
            kind: Of its numbers, as NumPy has it: `f` or `i`.

        Raises:
            BankError: It is no such array, or not whole.
        """
        entry = self._entries[name]
        shape, fortran, dtype, header = self._header(name)
        if dtype.hasobject or dtype.kind != kind or fortran or len(shape) != dims:
            raise self.error(
                f"holds {name} of {dtype} and shape {list(shape)}, where an array of numbers with "
                f"{dims} dimensions belongs; objects are never loaded. Precompute it again"
            )
        if header + math.prod(shape) * dtype.itemsize != entry.size:
            raise self.error(f"holds less or more of {name} than it says; precompute it again")
        return np.ndarray(shape, dtype, buffer=self._map, offset=entry.offset + header)

    def forget_pages(self) -> None:
        """Leaves what was read to the system's cache, out of this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _locate(self, info: zipfile.ZipInfo) -> _Entry:
        """Where a part begins: behind its own header, whose length it says itself."""
        lengths = self._map[info.header_offset + 26 : info.header_offset + _LOCAL_HEADER]
        name_and_extra = sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        offset = info.header_offset + _LOCAL_HEADER + name_and_extra
        if offset + info.file_size > len(self._map):
            raise self.error(f"is cut off within {info.filename}; precompute it again")
        return _Entry(offset, info.file_size)

    def _header(self, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
        """Shape, order and type of an array, and how many bytes say so."""
        stream: IO[bytes] = self._map  # type: ignore[assignment]
        stream.seek(self._entries[name].offset)
        try:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(stream)
        except (ValueError, KeyError, OSError) as error:
            raise self.error(f"holds {name}, which is no array: {error}") from None
        return shape, fortran, dtype, stream.tell() - self._entries[name].offset
