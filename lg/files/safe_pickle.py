"""Read pickles of NumPy arrays and plain values without running code.

A pickle may call every function that it names, so only the names listed here are allowed, and each
is replaced by a stand-in that only holds bytes. NumPy's own functions would be unsafe: a pickle can
pass them dtypes that make them interpret bytes as object pointers.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lg.errors import DataError

# Every stand-in class defines __setstate__: otherwise a pickle could set attributes of the class.


class _Dtype:
    """Stand-in for numpy.dtype that allows numbers only."""

    __slots__ = ("code", "order")

    def __init__(self, code: str | bytes, align: object = False, copy: object = True) -> None:
        self.code = _text(code)
        self.order = "|"
        if self.code not in ("f2", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"):
            raise pickle.UnpicklingError(f"an array of dtype {self.code!r}")

    def __setstate__(self, state: Any) -> None:
        self.order = _text(state[1])  # the other entries describe fields of structured dtypes

    def build(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """Stand-in for numpy.ndarray, and for the functions that construct one in a pickle.

    `_reconstruct` creates an empty array whose state follows; in protocol 5, `_frombuffer` has the
    arguments (content, dtype, shape, order) instead.
    """

    __slots__ = ("state",)

    def __init__(self, *arguments: Any) -> None:
        if len(arguments) == 4:
            content, dtype, shape, order = arguments
            self.state = 1, shape, dtype, order == "F", content

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def build(self) -> np.ndarray:
        _, shape, stored_dtype, column_order, content = self.state
        content, dtype = _bytes(content), stored_dtype.build()
        if math.prod(shape) * dtype.itemsize != len(content):
            raise pickle.UnpicklingError(f"{len(content)} bytes for an array of shape {shape}")
        array = np.frombuffer(content, dtype)
        return array.reshape(shape, order="F" if column_order else "C")


class _Encode:
    """Stand-in for _codecs.encode, which Python 3 uses to write bytes in protocols 0 to 2."""

    __slots__ = ()

    def __new__(cls, text: Any, encoding: Any = "latin1") -> Any:
        if encoding != "latin1":  # other codecs decompress data
            raise pickle.UnpicklingError(f"text encoded by {encoding!r}")
        return text.encode("latin1")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("state of a function")


def _scalar(dtype: _Dtype, content: str | bytes) -> int | float:
    """Stand-in for NumPy's function of this name, which creates a single number."""
    return np.frombuffer(_bytes(content), dtype.build(), count=1).item()


# NumPy 1 and NumPy 2 use different module names.
NUMBERS: dict[str, Any] = {
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
ARRAYS: dict[str, Any] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.core.numeric._frombuffer": _Array,
    "numpy._core.numeric._frombuffer": _Array,
    "_codecs.encode": _Encode,
}


class _RefusedError(Exception):
    """A pickle names something that is not on the list."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in ARRAYS:
            raise _RefusedError(full_name)
        return ARRAYS[full_name]


def load_table(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Load entries of a pickled dict of plain values and NumPy arrays, of any pickle protocol.

    Args:
        path: Path of the pickle.
        keys: The entries to return; in the file, keys may be str or bytes.

    Returns:
        key -> value. Arrays are read-only; bytes in lists become str.

    Raises:
        DataError: The file is missing or damaged, lacks a key, or names anything but NumPy's
            arrays, in which case nothing is called.
    """
    try:
        with open(path, "rb") as file:
            # Python 2 strings may be text or bytes; as bytes, 150 MB of pixels need no decoding.
            table = _ArrayUnpickler(file, encoding="bytes").load()
        entries = {_text(key): value for key, value in table.items()}
        return {key: _plain(entries[key]) for key in keys}
    except _RefusedError as refused:
        raise DataError(
            f"{path}: it tries to call {refused}, which no data set needs; nothing was run. Do not "
            "trust the source of this file, download the set from its official address"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror or error})") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(
            f"{path}: this is not the expected pickled dict with {', '.join(keys)} "
            f"({type(error).__name__}: {error}); download it again"
        ) from error


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _bytes(value: Any) -> Any:
    return value.encode("latin1") if isinstance(value, str) else value  # Python 2 wrote a str


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.build()
    if isinstance(value, list | tuple):
        return [_text(item) if isinstance(item, bytes) else item for item in value]
    return value
