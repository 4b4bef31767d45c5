"""A guide that replays stored feature maps of the teacher instead of running it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lg.augment.view import View
from lg.device import free_memory, to_device
from lg.errors import BankError
from lg.guidance.bank_file import bank_path, open_bank, release_pages
from lg.guidance.replay import from_nearest, replay


class FeatureBank:
    """Stored maps as a guide: `bank(images, index, view) -> (maps, None)`.

    Files of the original code load too; they have no provenance, so only counts and shapes can be
    checked.

    Attributes:
        path: The folder or file.
        provenance: Where the maps come from; None for files of the original code.
        indices: [n], the position of each row's image in its data set.
        feature_dims: Channels of the maps, in tap order.
        shapes: [C, H, W] of the maps, in tap order.
    """

    def __init__(self, path: str | os.PathLike[str], layers: Sequence[int]) -> None:
        """Open a bank.

        Args:
            path: The folder, or a `.npz` file of the original code.
            layers: Blocks of the teacher whose maps to return, in tap order.

        Raises:
            BankError: The bank cannot be read or lacks one of the layers.
        """
        self.path = bank_path(path)
        self.provenance, arrays, self.indices = open_bank(path)
        if missing := [layer for layer in layers if layer not in arrays]:
            raise BankError(
                f"{self.path} holds blocks {', '.join(map(str, arrays))} of the guide, not "
                f"{', '.join(map(str, missing))}. Compute the features of these blocks, or change "
                "DISTILLATION.INTER_TEACHER_INDEX."
            )
        self._arrays: list[Any] = [arrays[layer] for layer in layers]
        self._views = torch.tensor(self.provenance.views if self.provenance else [View()])
        self._is_resident = False
        self.shapes = [array.shape[2:] for array in self._arrays]
        self.feature_dims = [shape[0] for shape in self.shapes]
        self._rows = torch.full((int(self.indices.max(initial=-1)) + 1,), -1)  # index -> row
        self._rows[torch.from_numpy(self.indices)] = torch.arange(len(self.indices))

    def __len__(self) -> int:
        return len(self.indices)

    def check(self, *, indices: np.ndarray, shapes: Sequence[Sequence[int]], **facts: Any) -> None:
        """Check that the bank belongs to a training.

        Args:
            indices: Positions of the training images in their whole split.
            shapes: [C, H, W] of the teacher's maps, in tap order.
            **facts: Attributes of `Provenance` with the values required; None if unknown.

        Raises:
            BankError: Something differs; the message lists every difference.
        """
        stored = vars(self.provenance) if self.provenance else {"count": len(self)}
        differences = [
            f"{name.replace('_', ' ')} {_short(stored[name])} (expected {_short(value)})"
            for name, value in facts.items()
            if value is not None and stored.get(name, value) != value
        ]
        found, expected = ([tuple(shape) for shape in some] for some in (self.shapes, shapes))
        if found != expected:
            differences.append(f"shapes {found} (expected {expected})")
        lacking = len(indices) - int(np.isin(indices, self.indices).sum())
        if lacking and not differences:
            differences.append(
                f"it lacks {lacking} of the {len(indices)} training images (computed with another "
                "TRAIN.FRACTION, VAL_FRACTION or SPLIT_SEED, or with other images skipped)"
            )
        if differences:
            raise BankError(
                f"{self.path} does not match this training: {'; '.join(differences)}. Compute the "
                "features again with precompute_feature.py, or set DISTILLATION.FEATURE_FILE to "
                "another bank."
            )

    def make_resident(self, device: torch.device) -> None:
        """Copy the maps to a device; later batches are taken from there.

        Raises:
            BankError: They do not fit.
        """
        needed = sum(array.nbytes for array in self._arrays)
        if needed > (free := free_memory(device)):
            raise BankError(
                f"DISTILLATION.FEATURE_PLACE is device, but {self.path} needs {needed / 1e9:.1f} "
                f"GB and {device} has {free / 1e9:.1f} GB left. Set it to file."
            )
        mapped = self._arrays
        self._arrays = [torch.from_numpy(np.array(array)).to(device) for array in mapped]
        self._is_resident = True
        release_pages(mapped)

    def __call__(
        self, images: Tensor, index: Tensor | None = None, view: Tensor | None = None
    ) -> tuple[list[Tensor], None]:
        """Return the maps of a batch, cropped and flipped as its images were.

        Args:
            images: [N, C, S, S]; only their device matters.
            index: [N], positions of the images in their data set. In host memory; anywhere else
                the host waits for the device.
            view: [N, 5], see `lg.augment.view.View`; likewise.

        Returns:
            Maps [N, C, H, W] in float32, in tap order, and None: logits are not stored.
        """
        assert index is not None and view is not None, "stored maps need index and view"
        device = images.device
        rows = self._rows[index.cpu()]
        nearest, rest = from_nearest(view.cpu(), self._views)
        if self._is_resident:
            place = self._arrays[0].device
            at = to_device(rows, place), to_device(nearest, place)
            maps = [array[at] for array in self._arrays]
        else:
            picked = (array[rows.numpy(), nearest.numpy()] for array in self._arrays)
            maps = [torch.from_numpy(array) for array in picked]
            release_pages(self._arrays)
        rest = to_device(rest, device)
        return [replay(to_device(m, device), rest) for m in maps], None


def _short(value: Any) -> str:
    """Shorten hashes for a message."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
