"""A guide's feature maps, computed once, kept in a file and replayed.

Shapes: N batch, C channels, H and W the map; n images in the bank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lg.guidance.bank_file import INDICES, BankFile


class FeatureBank:
    """Stored maps in place of a guide: `bank(images, index, view) -> (maps, None)`.

    Files of the original code, arrays alone, load too; of those only counts and shapes can be
    checked.

    Attributes:
        layers: Blocks of the guide whose maps are given, in tap order.
        provenance: Where they come from; None in files of the original code.
        indices: [n], the place of each row's image in its data set.
        feature_dims: Channels of the maps, in tap order.
        shapes: [C, H, W] of the maps, in tap order.
    """

    def __init__(self, path: str | os.PathLike[str], layers: Sequence[int]) -> None:
        """Opens a file.

        Args:
            path: The `.npz` file.
            layers: Blocks of the guide to give.

        Raises:
            BankError: Missing, truncated or foreign file, or one without these layers.
        """
        self._file = BankFile(path)
        self.provenance = self._file.provenance()
        self.layers = tuple(layers)
        names = self._array_names()
        missing = [layer for layer in layers if layer not in names]
        if missing:
            raise self._file.error(
                f"holds the guide's blocks {', '.join(map(str, names))}, not "
                f"{', '.join(map(str, missing))}; precompute it for "
                "DISTILLATION.INTER_TEACHER_INDEX, or change that"
            )
        # Of each block the maps of the images and, if they are stored, of the mirrored images.
        arrays = {
            layer: tuple(self._file.array(name, dims=4, kind="f") for name in pair)
            for layer, pair in names.items()
        }
        self._check_arrays(arrays)
        self._arrays: list[tuple[Any, ...]] = [arrays[layer] for layer in layers]
        self._is_resident = False
        self.shapes = [pair[0].shape[1:] for pair in self._arrays]
        self.feature_dims = [shape[0] for shape in self.shapes]
        self.indices = np.arange(len(self._arrays[0][0]))
        if INDICES in self._file.names:
            stored = np.array(self._file.array(INDICES, dims=1, kind="i"))
            if len(stored) != len(self.indices):
                raise self._file.error(f"holds {len(self)} maps for {len(stored)} images")
            self.indices = stored
        self._rows = _inverse(self.indices)

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
            raise self._file.error(
                f"does not belong to this training: {'; '.join(differing)}. Compute the features "
                "again with precompute_feature.py, or name another DISTILLATION.FEATURE_FILE"
            )

    def make_resident(self, device: torch.device) -> None:
        """Copies the maps to a device, where all later batches are taken from.

        Raises:
            BankError: They do not fit.
        """
        needed = sum(array.nbytes for pair in self._arrays for array in pair)
        if device.type == "cuda" and needed > torch.cuda.mem_get_info(device)[0]:
            raise self._file.error(
                f"needs {needed / 1e9:.1f} GB, more than {device} has left; set "
                "DISTILLATION.FEATURE_PLACE file"
            )
        self._arrays = [
            tuple(torch.from_numpy(np.array(array)).to(device) for array in pair)
            for pair in self._arrays
        ]
        self._is_resident = True
        self._file.forget_pages()

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
        place = self._arrays[0][0].device if self._is_resident else torch.device("cpu")
        rows: Any = torch.from_numpy(self._rows).to(place)[index.to(place)]
        flip: Any = view[:, 4].to(place) > 0.5
        if not self._is_resident:
            rows, flip = rows.numpy(), flip.numpy()
        maps = [_pick(pair, rows, flip) for pair in self._arrays]
        if not self._is_resident:
            maps = [torch.from_numpy(array) for array in maps]
            self._file.forget_pages()
        if len(self._arrays[0]) == 2:
            view = unflipped(view)
        return [replay(m.to(images.device), view.to(images.device)) for m in maps], None

    def _array_names(self) -> dict[int, tuple[str, ...]]:
        """Which arrays belong to which block of the guide."""
        if self.provenance is not None:
            if any(name not in self._file.names for name in self.provenance.array_names()):
                raise self._file.error(
                    "lacks arrays that its provenance names; precompute it again"
                )
            kinds = ("layer", "mirrored") if self.provenance.mirrored else ("layer",)
            return {i: tuple(f"{kind}_{i}.npy" for kind in kinds) for i in self.provenance.layers}
        arrays = [name for name in self._file.names if name.endswith(".npy")]
        if not arrays:
            raise self._file.error("holds no arrays; precompute it again")
        return {i: (name,) for i, name in enumerate(arrays)}  # the original: stages in order

    def _check_arrays(self, arrays: dict[int, tuple[np.ndarray, ...]]) -> None:
        counts = [len(array) for pair in arrays.values() for array in pair]
        if len(set(counts)) > 1:
            raise self._file.error(
                f"holds maps of {', '.join(map(str, counts))} images; precompute it again"
            )
        if self.provenance is None:
            return
        for position in range(len(next(iter(arrays.values())))):
            found = [list(pair[position].shape[1:]) for pair in arrays.values()]
            if found != self.provenance.shapes:
                raise self._file.error(
                    f"holds maps of shapes {found}, its provenance says {self.provenance.shapes}; "
                    "precompute it again"
                )


def unflipped(view: Tensor) -> Tensor:
    """The views [N, 5] of mirrored images that show what flipped views show of the images."""
    top, left, height, width, flip = view.unbind(dim=1)
    left = torch.where(flip > 0.5, 1 - left - width, left)
    return torch.stack([top, left, height, width, torch.zeros_like(flip)], dim=1)


def _pick(pair: tuple[Any, ...], rows: Any, flip: Any) -> Any:
    """Rows of the maps; of those of the mirrored images, if they are there, where `flip` says."""
    if len(pair) == 1:
        return pair[0][rows]
    if isinstance(rows, Tensor):  # no count of flips, for which a GPU would have to be waited for
        return torch.where(flip[:, None, None, None], pair[1][rows], pair[0][rows])
    picked = pair[0][rows]
    picked[flip] = pair[1][rows[flip]]
    return picked


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


def _short(value: Any) -> str:
    """A value for a message; of a hash its beginning."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def _inverse(indices: np.ndarray) -> np.ndarray:
    """The row of each image, -1 for images that are not there."""
    rows = np.full(int(indices.max(initial=-1)) + 1, -1, dtype=np.int64)
    rows[indices] = np.arange(len(indices))
    return rows
