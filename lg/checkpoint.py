"""Checkpoints: atomic saves, safe strict loads, retention, and the published file format.

Every file is one dict of tensors and plain values, readable with `torch.load(weights_only=True)`.
Model weights are stored under the published names, so that files of this project and of the
original code are of one format. Only the main process writes.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lg.errors import CheckpointError
from lg.files.atomic import TEMPORARY, write_atomically
from lg.files.safe_pickle import NUMBERS
from lg.models.published import load_published_state_dict
from lg.paths import local_path

DEFAULT_CACHE = "/tmp/pycls-download-cache"
BEST_NAME = "model.pyth"
_NAME = re.compile(r"model_epoch_(\d+)\.pyth")
_ENTRY_BYTES = 300  # of a tensor in a file, besides its values
# Where other projects' files keep their weights, the average first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

# What to do when a file cannot be written.
_ROOM = (
    "make room there (TRAIN.KEEP_CHECKPOINTS 1 needs the least), or move OUT_DIR to a larger disk"
)
_WRITABLE = "make OUT_DIR writable"
_WAYS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EISDIR: "move away the folder of that name",
    errno.EIO: "check the disk",
}


def read_checkpoint(path: str | os.PathLike[str], *, cache: str = DEFAULT_CACHE) -> dict[str, Any]:
    """Reads a checkpoint without running any code in it.

    Args:
        path: file or URL.
        cache: folder for what is fetched.

    Raises:
        CheckpointError: missing, truncated, damaged, or with contents other than tensors and plain
            values.
    """
    name = os.fspath(path)
    try:
        file = local_path(name, cache=cache)
        if zipfile.is_zipfile(file):
            damaged = _damaged_part(file)
            if damaged:
                raise CheckpointError(
                    f"{name} is damaged: its part {damaged} is not what was written. Use another "
                    "copy."
                )
        if name.endswith(".safetensors"):
            state: Any = safetensors.torch.load_file(file)
        else:
            numbers: list[Any] = [(stand_in, name) for name, stand_in in NUMBERS.items()]
            with torch.serialization.safe_globals(numbers):
                state = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(
            f"{name} does not exist. Check the path, or train the model that writes it first."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # torch and pickle raise many kinds for bad files
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} is not a whole checkpoint of tensors and plain values (truncated, damaged, "
            f"or with objects in it, which are "
            f"never loaded): {first}"
        ) from None
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{name} holds a {type(state).__name__}; a checkpoint is a dict.")
    return state


def choose_weights(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The weights a checkpoint stands for: those of the model, or of its average where that tested
    better.

    An error rate that is missing or no number counts as 100. Also takes a bare state dict (names to
    tensors).

    Raises:
        CheckpointError: there are no weights where they should be.
    """
    if "model_state" not in state:
        if all(isinstance(v, Tensor) for v in state.values()):
            return dict(state)
        raise CheckpointError(
            f"{name} has no model_state; its keys are {', '.join(map(str, list(state)[:6]))}."
        )
    parts = {"model_state": state["model_state"], "ema_state": state.get("ema_state")}
    if parts["ema_state"] is None:  # files without an average say so in either way
        parts["ema_state"] = {}
    for key, part in parts.items():
        if not isinstance(part, Mapping):
            raise CheckpointError(
                f"{name} holds a {type(part).__name__} as its {key}; that is a dict of tensors in "
                "a checkpoint. Use another file."
            )
    use_average = parts["ema_state"] and _error(state, "test_err") > _error(state, "ema_err")
    return dict(parts["ema_state" if use_average else "model_state"])


def foreign_weights(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of a file that another project wrote: bare, or under one of the usual names, with
    or without the `module.` of a wrapped model. An average of the weights is preferred.

    Raises:
        CheckpointError: there are none.
    """
    inner = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), state)
    weights = {str(k).removeprefix("module."): v for k, v in inner.items()}
    if not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise CheckpointError(
            f"{name} holds no weights: its keys are {', '.join(map(str, list(state)[:6]))}. Use a "
            f"file of tensors by name, alone or under {', '.join(_WRAPPERS)}."
        )
    return weights


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, cache: str = DEFAULT_CACHE
) -> dict[str, Any]:
    """Loads a model's weights, strictly, from a checkpoint of this project or a published one.

    When the file holds weights and their average, the one with the lower test error is taken.

    Args:
        model: a model of `lg.build_model`.
        path: file or URL.
        cache: folder for what is fetched.

    Returns:
        What the file says besides its weights: epoch, test_err, ema_err, cfg, as far as they are
        there.

    Raises:
        CheckpointError: see `read_checkpoint`; also for keys or shapes that are not the model's.
            The model is then unchanged.
    """
    state = read_checkpoint(path, cache=cache)
    try:
        load_published_state_dict(model, choose_weights(state, os.fspath(path)))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from None
    found: dict[str, Any] = {k: state[k] for k in ("epoch", "cfg") if k in state}
    return found | {k: _error(state, k) for k in ("test_err", "ema_err") if k in state}


class CheckpointFolder:
    """The checkpoints of one run: `checkpoints/model_epoch_NNNN.pyth`, and the best as
    `model.pyth`."""

    def __init__(self, out_dir: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.best = Path(out_dir) / BEST_NAME
        self.folder = Path(out_dir) / "checkpoints"
        self.keep = keep

    def files(self) -> list[Path]:
        """Checkpoints, oldest first."""
        found = self.folder.glob("model_epoch_*.pyth")
        return sorted((p for p in found if _NAME.fullmatch(p.name)), key=_number)

    def save(self, state: dict[str, Any], *, epoch: int, is_best: bool) -> Path:
        """Writes the checkpoint of an epoch (counted from 1), and the best if it is that; then
        drops the oldest.

        Leftovers of a save that was killed are removed: only one process saves, so none is in use.
        Later epochs, which were passed over when the run was taken up, are left alone.

        Raises:
            CheckpointError: it cannot be written; what was there before is as it was.
        """
        path = self.folder / f"model_epoch_{epoch:04d}.pyth"
        # The best first: a run killed in between goes on from before it and writes both again,
        # whereas the checkpoint alone would say that the best has been written.
        for place in (self.best, path) if is_best else (path,):
            try:
                for folder in (self.folder, self.folder.parent):
                    for leftover in folder.glob(f"{TEMPORARY}model*.pyth-*"):
                        leftover.unlink(missing_ok=True)
                _write(place, state)
            except OSError as error:
                raise CheckpointError(self._not_written(place, state, error)) from None
        earlier = [p for p in self.files() if _number(p) <= epoch and not p.is_dir()]
        for old in earlier[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def _not_written(self, place: Path, state: dict[str, Any], error: OSError) -> str:
        """Why, how much room there is, what is left, and how to go on."""
        try:
            free = f"{shutil.disk_usage(self.best.parent).free / 1e6:,.2f} MB"
        except OSError:
            free = "an unknown amount"
        way, needed = _WAYS.get(error.errno or 0, "mend that"), f"{file_size(state) / 1e6:,.2f} MB"
        told = (
            f"{place} cannot be written: {error.strerror}. It takes {needed}, {free} is free "
            "there. "
        )
        last = next((p for p in reversed(self.files()) if _is_whole(p)), None)
        if last is None:
            return f"{told}No checkpoint was written before: {way}, and start again."
        return (
            f"{told}The last checkpoint, {last}, is whole: {way}, and the same command goes on "
            "from it."
        )

    def load_last(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest checkpoint that is whole and what its name says; None when there are none.

        Others are passed over with a warning.

        Raises:
            CheckpointError: there are checkpoints, and none can be used.
        """
        faults = []
        for path in reversed(self.files()):
            try:
                return _read_own(path)
            except CheckpointError as error:
                warn(f"{error} Going back to the checkpoint before it.")
                faults.append(path.name)
        if faults:
            raise CheckpointError(
                f"No checkpoint in {self.folder} can be used ({', '.join(faults)}). To start "
                "afresh, remove them, or set OUT_DIR to a new folder."
            )
        return None


def _write(place: Path, state: dict[str, Any]) -> None:
    for last in (False, True):
        try:
            return write_atomically(place, lambda stream: torch.save(state, stream))
        except FileNotFoundError:  # the folder was removed meanwhile
            if last:
                raise


def _number(path: Path) -> int:
    """The epoch that a checkpoint's name says."""
    return int(path.stem[12:])


def _read_own(path: Path) -> dict[str, Any]:
    """Reads a run's checkpoint; finds one under another epoch's name, which would hide all that
    come between. What other software wrote has no progress; who takes it up says what it lacks."""
    state = read_checkpoint(path)
    position = state.get("sampler_state")
    if isinstance(position, Mapping):
        epoch = position.get("epoch", 0) + (position.get("step", 0) > 0)
        if epoch != _number(path):
            raise CheckpointError(
                f"{path} is named as that of epoch {_number(path)} and holds epoch {epoch}: move "
                f"it away, or name it model_epoch_{epoch:04d}.pyth."
            )
    return state


def _is_whole(path: Path) -> bool:
    try:
        return bool(_read_own(path))
    except CheckpointError:
        return False


def file_size(state: dict[str, Any]) -> int:
    """Estimate the size in bytes of a checkpoint's file from its tensors."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    return sum(tensor.nbytes + _ENTRY_BYTES for tensor in tensors)


def _damaged_part(file: str) -> str | None:
    """The first entry of a zip file that does not match its checksum, which torch does not look at,
    or that is marked as a folder (bit 4), of which torch reads nothing and returns stray memory."""
    with zipfile.ZipFile(file) as archive:
        folders = (e.filename for e in archive.infolist() if e.external_attr & 0x10)
        return archive.testzip() or next(folders, None)


def _error(state: Mapping[str, Any], key: str) -> float:
    """An error rate in percent, 100 where the file does not say."""
    try:
        value = float(state.get(key, math.nan))
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return 100.0
    return 100.0 if math.isnan(value) else value


def random_state() -> dict[str, Any]:
    """The states of the generators that models draw from in this process."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`, as far as the devices of the two machines agree."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
