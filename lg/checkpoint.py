"""Checkpoints: atomic saves, safe and strict loads, retention, and the published file format.

A checkpoint is one dict of tensors and plain values, readable with `torch.load(weights_only=True)`.
Model weights are stored under their published names, so files of this project and of the original
code share one format. Only the main process writes.
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

from lg.errors import CheckpointError, first_line
from lg.files.atomic import remove_leftovers, write_atomically
from lg.files.safe_pickle import NUMBERS
from lg.models.positions import resample_positions
from lg.models.published import load_published_state_dict, published_state_dict
from lg.paths import local_path

DEFAULT_CACHE = "/tmp/pycls-download-cache"
BEST_NAME = "model.pyth"
_NAME = re.compile(r"model_epoch_(\d+)\.pyth")
# Keys of the weights in files of other projects, averages first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_ENTRY_BYTES = 300  # of a tensor in a file, besides its values

_FREE_SPACE = "free space (TRAIN.KEEP_CHECKPOINTS 1 needs the least) or move OUT_DIR elsewhere"
_MAKE_WRITABLE = "make OUT_DIR writable"
_FIXES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EROFS: _MAKE_WRITABLE,
    errno.EACCES: _MAKE_WRITABLE,
    errno.EPERM: _MAKE_WRITABLE,
    errno.EISDIR: "move the folder of that name away",
    errno.EIO: "check the disk",
}


def read_checkpoint(path: str | os.PathLike[str], *, cache: str = DEFAULT_CACHE) -> dict[str, Any]:
    """Read a checkpoint without running any code in it.

    Args:
        path: File or URL.
        cache: Folder for downloads.

    Raises:
        CheckpointError: The file is missing, truncated or damaged, or holds anything but tensors
            and plain values.
    """
    name = os.fspath(path)
    try:
        state = _load(local_path(name, cache=cache))
    except FileNotFoundError:
        raise CheckpointError(
            f"{name} does not exist: check the path, or train the model that writes it first."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # torch, safetensors and pickle raise many types for bad files
        raise CheckpointError(
            f"{name} is damaged or incomplete, or holds more than tensors and plain values, and "
            f"objects are never loaded ({first_line(error)}). Use another copy."
        ) from None
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{name} holds a {type(state).__name__}; a checkpoint is a dict.")
    return state


def _load(file: str) -> Any:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            # torch skips the checksums; of entries marked as folders (bit 4) it reads nothing and
            # returns uninitialised memory.
            folders = (e.filename for e in archive.infolist() if e.external_attr & 0x10)
            damaged = archive.testzip() or next(folders, None)
        if damaged:
            raise ValueError(f"{damaged} is damaged")
    if file.endswith(".safetensors"):
        return safetensors.torch.load_file(file)
    numbers: list[Any] = [(stand_in, name) for name, stand_in in NUMBERS.items()]
    with torch.serialization.safe_globals(numbers):
        return torch.load(file, map_location="cpu", weights_only=True)


def choose_weights(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return the weights of a checkpoint: the model's, or their average if its test error is lower.

    A test error that is missing or not a number counts as 100.

    Args:
        state: A checkpoint, or a bare state dict.
        name: The file, for error messages.

    Raises:
        CheckpointError: There are no weights.
    """
    if "model_state" not in state:
        if all(isinstance(value, Tensor) for value in state.values()):
            return dict(state)
        raise CheckpointError(f"{name} has no model_state; its keys are {_first_keys(state)}.")
    average = state.get("ema_state")
    parts = {"model_state": state["model_state"], "ema_state": {} if average is None else average}
    for key, part in parts.items():
        if not isinstance(part, Mapping):
            raise CheckpointError(
                f"{name} holds a {type(part).__name__} as its {key}, which must be a dict of "
                "tensors. Use another file."
            )
    use_average = parts["ema_state"] and _error(state, "test_err") > _error(state, "ema_err")
    return dict(parts["ema_state" if use_average else "model_state"])


def foreign_weights(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return the weights in a file of another project.

    They may be bare or under one of the usual keys, with or without the prefix `module.` of a
    wrapped model. An average of the weights is preferred.

    Args:
        state: The content of the file.
        name: The file, for error messages.

    Raises:
        CheckpointError: There are no weights.
    """
    inner = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), state)
    weights = {str(key).removeprefix("module."): value for key, value in inner.items()}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f"{name} holds no weights: its keys are {_first_keys(state)}. Use a file of tensors by "
            f"name, bare or under {', '.join(_WRAPPERS)}."
        )
    return weights


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    cache: str = DEFAULT_CACHE,
    any_size: bool = False,
) -> dict[str, Any]:
    """Load weights into a model, strictly, from a checkpoint of this project or a published one.

    If the file holds both weights and their average, the ones with the lower test error are loaded.

    Args:
        model: A model of `lg.build_model`.
        path: File or URL.
        cache: Folder for downloads.
        any_size: Whether to resample position embeddings of another image size.

    Returns:
        The other facts of the file: epoch, test_err, ema_err, cfg, class_names, if present. With
        `any_size`, also resampled: key -> (old shape, new shape) of the resampled embeddings.

    Raises:
        CheckpointError: The file cannot be read (see `read_checkpoint`), or its keys or shapes
            differ from the model's; the model is then unchanged.
    """
    name = os.fspath(path)
    state = read_checkpoint(name, cache=cache)
    weights = choose_weights(state, name)
    fitted = resample_positions(weights, published_state_dict(model)) if any_size else {}
    try:
        load_published_state_dict(model, {**weights, **fitted})
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
    facts: dict[str, Any] = {
        key: state[key] for key in ("epoch", "cfg", "class_names") if key in state
    }
    if any_size:
        facts["resampled"] = {
            key: (list(weights[key].shape), list(new.shape)) for key, new in fitted.items()
        }
    return facts | {key: _error(state, key) for key in ("test_err", "ema_err") if key in state}


class CheckpointFolder:
    """The checkpoints of a run: `checkpoints/model_epoch_NNNN.pyth`, and `model.pyth`, the best."""

    def __init__(self, out_dir: str | os.PathLike[str], *, keep: int = 2) -> None:
        """Nothing is created before the first save.

        Args:
            out_dir: The run's folder.
            keep: Number of checkpoints to keep.
        """
        self.best = Path(out_dir) / BEST_NAME
        self.folder = Path(out_dir) / "checkpoints"
        self.keep = keep

    def files(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        found = self.folder.glob("model_epoch_*.pyth")
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_epoch_in_name)

    def save(self, state: dict[str, Any], *, epoch: int, is_best: bool) -> Path:
        """Write the checkpoint of an epoch, and the best if it is that; remove old checkpoints.

        Checkpoints of later epochs, which were skipped when the run was resumed, are kept.

        Args:
            state: Tensors and plain values.
            epoch: Counted from 1.
            is_best: Whether to write `model.pyth` as well.

        Returns:
            The path of the checkpoint.

        Raises:
            CheckpointError: It cannot be written; earlier files are unchanged.
        """
        path = self.folder / f"model_epoch_{epoch:04d}.pyth"
        # The best is written first: a run killed in between resumes before it and writes both
        # again. In the other order, the best would be missing.
        for place in (self.best, path) if is_best else (path,):
            try:
                for other in (self.best, path):  # of a killed save; a folder has a single writer
                    remove_leftovers(other.with_name("model*.pyth"))
                write_atomically(place, lambda stream: torch.save(state, stream))
            except OSError as error:
                raise CheckpointError(self._describe_failure(place, error)) from None
        saved = [p for p in self.files() if _epoch_in_name(p) <= epoch and not p.is_dir()]
        for old in saved[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def load_last(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """Return the newest usable checkpoint, or None if there are no checkpoints.

        Args:
            warn: Called with a message for each checkpoint that is skipped.

        Raises:
            CheckpointError: There are checkpoints, but none can be used.
        """
        unusable = []
        for path in reversed(self.files()):
            try:
                return _read_own(path)
            except CheckpointError as error:
                warn(f"{error} Skipping this checkpoint.")
                unusable.append(path.name)
        if unusable:
            raise CheckpointError(
                f"No checkpoint in {self.folder} can be used ({', '.join(unusable)}): remove them "
                "to start again, or set OUT_DIR to a new folder."
            )
        return None

    def _describe_failure(self, place: Path, error: OSError) -> str:
        """Return why a save failed, which checkpoint is intact, and the fix."""
        try:
            free = f"{shutil.disk_usage(self.best.parent).free / 1e6:,.2f} MB free"
        except OSError:
            free = "free space unknown"
        fix = _FIXES.get(error.errno or 0, "fix the cause")
        failure = f"{place} cannot be written: {error.strerror} ({free})."
        for path in reversed(self.files()):
            try:
                _read_own(path)
            except CheckpointError:
                continue
            return (
                f"{failure} The last checkpoint, {path}, is intact: {fix}, then resume with the "
                "same command."
            )
        return f"{failure} No checkpoint was written before: {fix}, then start again."


def _epoch_in_name(path: Path) -> int:
    return int(path.stem[12:])


def _read_own(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run; reject one under the name of another epoch, which would hide the
    checkpoints between the two."""
    state = read_checkpoint(path)
    position = state.get("sampler_state")
    if isinstance(position, Mapping):  # files of other software are rejected by `restore_last`
        epoch = position.get("epoch", 0) + (position.get("step", 0) > 0)
        if epoch != _epoch_in_name(path):
            raise CheckpointError(
                f"{path} holds epoch {epoch}: rename it to model_epoch_{epoch:04d}.pyth, or move "
                "it away."
            )
    return state


def file_size(state: dict[str, Any]) -> int:
    """Estimate the size in bytes of a checkpoint's file from its tensors."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    return sum(tensor.nbytes + _ENTRY_BYTES for tensor in tensors)


def _first_keys(state: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(state)[:6]))


def _error(state: Mapping[str, Any], key: str) -> float:
    """Return a test error in percent; 100 if it is missing or not a number."""
    try:
        value = float(state.get(key, math.nan))
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return 100.0
    return 100.0 if math.isnan(value) else value


def random_state() -> dict[str, Any]:
    """Return the states of torch's random generators in this process."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore the states of `random_state`, as far as this machine has the same devices."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
