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

from lg.augment.view import View
from lg.device import to_device
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
        arrays = {layer: self._array(name) for layer, name in names.items()}
        self._check_arrays(arrays)
        self._arrays: list[Any] = [arrays[layer] for layer in layers]
        self._views = torch.tensor(self.provenance.views if self.provenance else [View()])
        self._is_resident = False
        self.shapes = [array.shape[2:] for array in self._arrays]
        self.feature_dims = [shape[0] for shape in self.shapes]
        self.indices = np.arange(len(self._arrays[0]))
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
                "another TRAIN.FRACTION or RNG_SEED, or other images skipped)"
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
        needed = sum(array.nbytes for array in self._arrays)
        if device.type == "cuda" and needed > torch.cuda.mem_get_info(device)[0]:
            raise self._file.error(
                f"needs {needed / 1e9:.1f} GB, more than {device} has left; set "
                "DISTILLATION.FEATURE_PLACE file"
            )
        self._arrays = [torch.from_numpy(np.array(array)).to(device) for array in self._arrays]
        self._is_resident = True
        self._file.forget_pages()

    def __call__(
        self, images: Tensor, index: Tensor | None = None, view: Tensor | None = None
    ) -> tuple[list[Tensor], None]:
        """The maps that belong to a batch, cropped and flipped as its images were.

        Args:
            images: [N, 3, S, S]; only their device counts.
            index: [N], places of the images in their data set, in host memory (elsewhere the host
                has to wait for the device).
            view: [N, 5], see `lg.augment.view.View`, likewise.

        Returns:
            Maps [N, C, H, W] in float32, in tap order; there are no class scores.
        """
        assert index is not None and view is not None, "stored maps need index and view"
        device = images.device
        rows = torch.from_numpy(self._rows)[index.cpu()]
        nearest, rest = from_nearest(view.cpu(), self._views)
        if self._is_resident:
            place = self._arrays[0].device
            at = to_device(rows, place), to_device(nearest, place)
            maps = [array[at] for array in self._arrays]
        else:
            picked = (array[rows.numpy(), nearest.numpy()] for array in self._arrays)
            maps = [torch.from_numpy(array) for array in picked]
            self._file.forget_pages()
        rest = to_device(rest, device)
        return [replay(to_device(m, device), rest) for m in maps], None

    def _array(self, name: str) -> np.ndarray:
        """[n, V, C, H, W]; the original's files hold one view of each image."""
        if self.provenance is None:
            return self._file.array(name, dims=4, kind="f")[:, None]
        return self._file.array(name, dims=5, kind="f")

    def _array_names(self) -> dict[int, str]:
        """Which array belongs to which block of the guide."""
        if self.provenance is not None:
            names = self.provenance.array_names()
            if any(name not in self._file.names for name in names):
                raise self._file.error(
                    "lacks arrays that its provenance names; precompute it again"
                )
            return dict(zip(self.provenance.layers, names, strict=True))
        arrays = [name for name in self._file.names if name.endswith(".npy")]
        if not arrays:
            raise self._file.error("holds no arrays; precompute it again")
        return dict(enumerate(arrays))  # the original: stages in order

    def _check_arrays(self, arrays: dict[int, np.ndarray]) -> None:
        counts = [len(array) for array in arrays.values()]
        if len(set(counts)) > 1:
            raise self._file.error(
                f"holds maps of {', '.join(map(str, counts))} images; precompute it again"
            )
        if self.provenance is None:
            return
        found = [array.shape for array in arrays.values()]
        wanted = self.provenance.array_shapes(counts[0])
        if found != wanted:
            raise self._file.error(
                f"holds maps of shapes {found}, its provenance says {wanted}; precompute it again"
            )


def from_nearest(view: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """For each view the stored one that it is closest to, and what remains to be done to that.

    Closest: flipped alike if possible, then the smallest sum of distances between the sides of the
    boxes.

    Args:
        view: [N, 5], see `lg.augment.view.View`.
        stored: [V, 5].

    Returns:
        Positions in `stored` [N]; views [N, 5] that lead from those to `view`.
    """
    sides, stored_sides = (
        torch.cat([v[:, :2], v[:, :2] + v[:, 2:4], 1e3 * v[:, 4:]], dim=1) for v in (view, stored)
    )
    distance = (sides[:, None] - stored_sides).abs().sum(dim=2)
    nearest = distance.argmin(dim=1)
    top, left, height, width, flip = view.unbind(dim=1)
    top_0, left_0, height_0, width_0, flip_0 = stored[nearest].unbind(dim=1)
    top, height = (top - top_0) / height_0, height / height_0
    left, width = (left - left_0) / width_0, width / width_0
    left = torch.where(flip_0 > 0.5, 1 - left - width, left)  # in a mirrored image
    return nearest, torch.stack([top, left, height, width, (flip - flip_0).abs()], dim=1)


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
