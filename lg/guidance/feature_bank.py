"""A guide's feature maps, computed once, kept in a file and replayed.

The file is an uncompressed `.npz`: `layer_I.npy` [n, C, H, W] for each tapped block I of the guide,
`indices.npy` [n] with the place of each row's image in its data set, and `provenance.json`. Its
arrays are mapped into memory where they lie, so that opening is instant, processes share pages, and
a batch touches what it needs. Nothing in it is ever unpickled. Files of the original code, arrays
alone, load too; of those only counts and shapes can be checked.

Shapes: N batch, C channels, H and W the map; n images in the bank.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PROVENANCE = "provenance.json"
INDICES = "indices.npy"
_LOCAL_HEADER = 30  # bytes before the name in a zip entry; the lengths of name and extra end it


class BankError(ValueError):
    """A feature file that cannot be used: names the file, what is wrong and the fix."""


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
    versions: dict[str, str] = field(default_factory=dict)

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


class FeatureBank:
    """Stored maps in place of a guide: `bank(images, index, view) -> (maps, None)`.

    Attributes:
        layers: Blocks of the guide whose maps are given, in tap order.
        feature_dims: Channels of those maps.
        provenance: Where they come from; None in files of the original code.
        indices: [n], the place of each row's image in its data set.
    """

    def __init__(self, path: str | os.PathLike[str], layers: Sequence[int]) -> None:
        """Opens a file.

        Args:
            path: The `.npz` file.
            layers: Blocks of the guide to give.

        Raises:
            BankError: Missing, truncated or foreign file, or one without these layers.
        """
        self.path = Path(path)
        self.layers = tuple(layers)
        self._map, entries = _open(self.path)
        self.provenance = self._read_provenance(entries)
        stored = self._stored_layers(entries)
        arrays = {layer: self._array(entries[name]) for layer, name in stored.items()}
        missing = [layer for layer in layers if layer not in arrays]
        if missing:
            raise self._error(
                f"holds the guide's blocks {', '.join(map(str, arrays))}, not "
                f"{', '.join(map(str, missing))}; precompute it for "
                "DISTILLATION.INTER_TEACHER_INDEX, or change that"
            )
        self._arrays = [arrays[layer] for layer in layers]
        self._check_shapes(arrays)
        count = len(self._arrays[0])
        self.indices = np.arange(count)
        if INDICES in entries:
            self.indices = np.array(self._array(entries[INDICES], dims=1))
        if len(self.indices) != count:
            raise self._error(f"holds {count} maps for {len(self.indices)} images")
        self._rows = _inverse(self.indices)
        self._resident: list[Tensor] | None = None

    @property
    def feature_dims(self) -> list[int]:
        """Channels of the maps, in tap order."""
        return [array.shape[1] for array in self._arrays]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """[C, H, W] of the maps, in tap order."""
        return [array.shape[1:] for array in self._arrays]

    def __len__(self) -> int:
        return len(self.indices)

    def check(self, *, indices: np.ndarray, shapes: Sequence[Sequence[int]], **wanted: Any) -> None:
        """Holds the bank against the training it is to serve.

        Args:
            indices: Places of the training images in their whole split.
            shapes: [C, H, W] of the maps that the guide gives, in tap order.
            **wanted: Attributes of `Provenance` with the values they must have; None: not known.

        Raises:
            BankError: They differ; the message says in what, and what to do.
        """
        found = vars(self.provenance) if self.provenance is not None else {}
        count = wanted.get("count")
        wanted = {k: v for k, v in wanted.items() if k in found and v is not None}
        differing = [
            f"its {k.replace('_', ' ')} is {_short(found[k])}, here it is {_short(v)}"
            for k, v in wanted.items()
            if found[k] != v
        ]
        mine, theirs = ([tuple(s) for s in some] for some in (self.shapes, shapes))
        if mine != theirs:
            differing.append(f"its maps are {mine}, the guide's are {theirs}")
        if self.provenance is None and count is not None and count != len(self):
            differing.append(f"it holds {len(self)} images, the data set {count}")
        lacking = len(indices) - int(np.isin(indices, self.indices).sum())
        if lacking and not differing:
            differing.append(
                f"it lacks {lacking} of the {len(indices)} training images (it was computed with "
                "another TRAIN.FRACTION or RNG_SEED)"
            )
        if differing:
            raise self._error(
                f"does not belong to this training: {'; '.join(differing)}. Compute the features "
                "again with precompute_feature.py, or name another DISTILLATION.FEATURE_FILE"
            )

    def make_resident(self, device: torch.device) -> None:
        """Copies the maps to a device, where all later batches are taken from.

        Raises:
            BankError: They do not fit.
        """
        needed = sum(array.nbytes for array in self._arrays)
        if device.type == "cuda" and needed > torch.cuda.mem_get_info(device)[0]:
            raise self._error(
                f"needs {needed / 1e9:.1f} GB, more than {device} has left; set "
                "DISTILLATION.FEATURE_PLACE file"
            )
        self._resident = [torch.from_numpy(np.array(a)).to(device) for a in self._arrays]
        self._forget_pages()

    def __call__(
        self, images: Tensor, index: Tensor | None = None, view: Tensor | None = None
    ) -> tuple[list[Tensor], None]:
        """The maps that belong to a batch, cropped and flipped as its images were.

        Args:
            images: [N, 3, S, S]; only their device counts.
            index: [N], places of the images in their data set.
            view: [N, 5], see `lg.augment.view.View`.

        Returns:
            Maps [N, C, H, W] in float32, in tap order; there are no class scores.
        """
        assert index is not None and view is not None, "stored maps need index and view"
        if self._resident is not None:
            rows = torch.from_numpy(self._rows).to(index.device)[index]
            maps = [array[rows.to(array.device)] for array in self._resident]
        else:
            places = self._rows[index.cpu().numpy()]
            maps = [torch.from_numpy(array[places]) for array in self._arrays]
            self._forget_pages()
        return [replay(m.to(images.device), view.to(images.device)) for m in maps], None

    def _forget_pages(self) -> None:
        """What was read stays in the system's cache, not in this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _read_provenance(self, entries: dict[str, _Entry]) -> Provenance | None:
        if PROVENANCE not in entries:
            return None
        entry = entries[PROVENANCE]
        text = self._map[entry.offset : entry.offset + entry.size]
        try:
            return Provenance.from_json(text.decode())
        except (ValueError, TypeError) as error:
            raise self._error(f"cannot be read: {error}; precompute it again") from None

    def _stored_layers(self, entries: dict[str, _Entry]) -> dict[int, str]:
        """Which block of the guide each array belongs to."""
        if self.provenance is not None:
            named = {layer: f"layer_{layer}.npy" for layer in self.provenance.layers}
            if any(name not in entries for name in named.values()):
                raise self._error("lacks arrays that its provenance names; precompute it again")
            return named
        arrays = [name for name in entries if name.endswith(".npy")]
        if not arrays:
            raise self._error("holds no arrays; precompute it again")
        return dict(enumerate(arrays))  # the original code: the stages in order

    def _array(self, entry: _Entry, dims: int = 4) -> np.ndarray:
        """One array where it lies in the file."""
        shape, fortran, dtype, header = self._header(entry)
        kinds = "f" if dims == 4 else "i"
        if dtype.hasobject or dtype.kind not in kinds or fortran or len(shape) != dims:
            raise self._error(
                f"holds {entry.name} of {dtype} and shape {list(shape)}, where an array of numbers "
                f"with {dims} dimensions belongs; objects are never loaded. Precompute it again"
            )
        if header + math.prod(shape) * dtype.itemsize != entry.size:
            raise self._error(f"holds less or more of {entry.name} than it says; precompute again")
        return np.ndarray(shape, dtype, buffer=self._map, offset=entry.offset + header)

    def _header(self, entry: _Entry) -> tuple[tuple[int, ...], bool, np.dtype, int]:
        """Shape, order and type of an array, and how many bytes say so."""
        stream: IO[bytes] = self._map  # type: ignore[assignment]
        stream.seek(entry.offset)
        try:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(stream)
        except (ValueError, KeyError, OSError) as error:
            raise self._error(f"holds {entry.name}, which is no array: {error}") from None
        return shape, fortran, dtype, stream.tell() - entry.offset

    def _check_shapes(self, arrays: dict[int, np.ndarray]) -> None:
        if len({len(array) for array in arrays.values()}) > 1:
            raise self._error(
                f"holds maps of {', '.join(str(len(a)) for a in arrays.values())} images; "
                "precompute it again"
            )
        if self.provenance is None:
            return
        found = [list(array.shape[1:]) for array in arrays.values()]
        if found != self.provenance.shapes:
            raise self._error(
                f"holds maps of shapes {found}, its provenance says {self.provenance.shapes}; "
                "precompute it again"
            )

    def _error(self, text: str) -> BankError:
        return BankError(f"{self.path} {text}.")


def replay(maps: Tensor, view: Tensor) -> Tensor:
    """Crop and flip stored maps as images were cropped and flipped, in one resampling.

    The box is resized back to the map's own size, bilinearly; pixel centres correspond as in
    `torch.nn.functional.interpolate` with align_corners False, so that the full view gives the maps
    themselves. Beyond the image its border goes on.

    Args:
        maps: [N, C, H, W], in any precision.
        view: [N, 5], see `lg.augment.view.View`.

    Returns:
        [N, C, H, W], float32.
    """
    top, left, height, width, flip = view.float().unbind(dim=1)
    zero = torch.zeros_like(top)
    # In coordinates from -1 to 1 over the whole image: where the output's -1 to 1 lies.
    across = torch.stack([width * (1 - 2 * flip), zero, 2 * left + width - 1], dim=1)
    down = torch.stack([zero, height, 2 * top + height - 1], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(maps.shape), align_corners=False)
    return F.grid_sample(maps.float(), grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class _Entry:
    """Where the bytes of one part of the file lie."""

    name: str
    offset: int
    size: int


def _open(path: Path) -> tuple[mmap.mmap, dict[str, _Entry]]:
    """Map a file into memory and find its parts."""
    try:
        with open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise BankError(
            f"{path} does not exist. Compute the features first: python precompute_feature.py "
            "--cfg GUIDE.yaml --ckpt MODEL.pyth, or name the file as DISTILLATION.FEATURE_FILE."
        ) from None
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise BankError(
            f"{path} is no whole feature file ({error}); precompute it again."
        ) from None
    packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise BankError(
            f"{path} is compressed ({', '.join(packed[:3])}), so it cannot be mapped into memory; "
            "write it again with numpy.savez, or precompute it."
        )
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # batches are drawn at random: do not read ahead
    entries = {}
    for info in infos:
        lengths = mapped[info.header_offset + 26 : info.header_offset + _LOCAL_HEADER]
        name_and_extra = sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        offset = info.header_offset + _LOCAL_HEADER + name_and_extra
        if offset + info.file_size > len(mapped):
            raise BankError(f"{path} is cut off within {info.filename}; precompute it again.")
        entries[info.filename] = _Entry(info.filename, offset, info.file_size)
    return mapped, entries


def _short(value: Any) -> str:
    """A value for a message; of a hash its beginning."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def _inverse(indices: np.ndarray) -> np.ndarray:
    """The row of each image, -1 for images that are not there."""
    rows = np.full(int(indices.max(initial=-1)) + 1, -1, dtype=np.int64)
    rows[indices] = np.arange(len(indices))
    return rows
