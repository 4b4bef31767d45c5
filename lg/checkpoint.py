"""Checkpoints: atomic saves, safe strict loads, retention, and the published file format.

Every file is one dict of tensors and plain values, readable with `torch.load(weights_only=True)`.
Model weights are stored under the published names, so that files of this project and of the
original code are of one format. Only the main process writes.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from lg.models.published import load_published_state_dict
from lg.paths import local_path

DEFAULT_CACHE = "/tmp/pycls-download-cache"
BEST_NAME = "model.pyth"
_NAME = re.compile(r"model_epoch_(\d+)\.pyth")
_TEMPORARY = ".partial-"
# Where other projects' files keep their weights, the average first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

# What a NumPy number in a file is made of, such as an error rate in a published one: none of these
# does more than hold bytes. NumPy 1 and 2 name the first one differently.
_NUMBER = np.float64(0).__reduce__()[0]
_NUMPY_NUMBERS: list[Any] = [
    (_NUMBER, "numpy.core.multiarray.scalar"),
    (_NUMBER, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8")),
]


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint: names the file, what is wrong and the fix."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[Any], object]) -> None:
    """Calls `write(stream)` on a temporary file beside `path`, makes it durable, then renames it to
    `path`.

    Whatever happens, `path` holds either its old content or all of the new; no temporary file stays
    after an error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f"{_TEMPORARY}{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private to its owner
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes what a process that was killed in `write_atomically` left beside `path`."""
    path = Path(path)
    for leftover in path.parent.glob(f"{_TEMPORARY}{path.name}-*"):
        leftover.unlink(missing_ok=True)


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
            with torch.serialization.safe_globals(_NUMPY_NUMBERS):
                state = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(
            f"{name} does not exist. Check the path, or train the model that writes it first."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error}.") from None
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
        numbered = {p: _NAME.fullmatch(p.name) for p in self.folder.glob("model_epoch_*.pyth")}
        return sorted((p for p, m in numbered.items() if m), key=lambda p: int(p.stem[12:]))

    def save(self, state: dict[str, Any], *, epoch: int, is_best: bool) -> Path:
        """Writes the checkpoint of an epoch (counted from 1), and the best if it is that; then
        drops the oldest.

        Leftovers of a save that was killed are removed: only one process saves, so none is in use.
        """
        for place in (self.folder, self.folder.parent):
            for leftover in place.glob(f"{_TEMPORARY}model*.pyth-*"):
                leftover.unlink(missing_ok=True)
        path = self.folder / f"model_epoch_{epoch:04d}.pyth"
        # The best first: a run killed in between goes on from before it and writes both again,
        # whereas the checkpoint alone would say that the best has been written.
        for place in (self.best, path) if is_best else (path,):
            write_atomically(place, lambda stream: torch.save(state, stream))
        for old in self.files()[: -self.keep]:
            old.unlink()
        return path

    def load_last(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest readable checkpoint; None when there is none at all.

        A damaged file is passed over with a warning.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        faults = []
        for path in reversed(self.files()):
            try:
                state = read_checkpoint(path)
            except CheckpointError as error:
                warn(f"{error} Going back to the checkpoint before it.")
                faults.append(path.name)
                continue
            return state
        if faults:
            raise CheckpointError(
                f"No checkpoint in {self.folder} can be read ({', '.join(faults)}). To start "
                f"afresh, remove them, "
                "or set TRAIN.AUTO_RESUME False."
            )
        return None


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
