"""The allow-list of pickled files: what a table of arrays or a checkpoint may name.

A pickle is a program that calls what it names. Each name on the list is replaced by a stand-in that
only holds bytes. NumPy's own functions are not used: a pickle can pass them dtypes that make them
interpret bytes as object pointers.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lg.errors import DataError


class _Sealed:
    """A stand-in that a pickle can call, but not alter: BUILD finds this method, not __dict__."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("state where none belongs")


class _Dtype(_Sealed):
    """In place of numpy.dtype: whole and floating numbers only."""

    __slots__ = ("code", "order")

    def __init__(self, code: str | bytes, align: object = False, copy: object = True) -> None:
        self.code = _text(code)
        self.order = "|"
        if self.code not in ("f2", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"):
            raise pickle.UnpicklingError(f"an array of dtype {self.code!r}")

    def __setstate__(self, state: Any) -> None:
        self.order = _text(state[1])  # the rest describes fields, of which there are none

    def build(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array(_Sealed):
    """In place of numpy.ndarray and of _reconstruct, the function that makes an empty one."""

    __slots__ = ("column_order", "content", "dtype", "shape")

    def __init__(self, *ignored: object) -> None:
        """Wait for the state; what comes now is the class and shape of the empty array."""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.column_order, content = state
        # Python 2 wrote the bytes as its str
        self.content = content.encode("latin1") if isinstance(content, str) else content

    def build(self) -> np.ndarray:
        dtype = self.dtype.build()
        if math.prod(self.shape) * dtype.itemsize != len(self.content):
            raise pickle.UnpicklingError(
                f"{len(self.content)} bytes for an array of shape {self.shape}"
            )
        flat = np.frombuffer(self.content, dtype)
        return flat.reshape(self.shape, order="F" if self.column_order else "C")


def _scalar(dtype: _Dtype, content: str | bytes) -> int | float:
    """Replace NumPy's function of this name, which makes a single number."""
    raw = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(raw, dtype.build(), count=1).item()


class _Buffer(_Sealed):
    """In place of _frombuffer, which makes arrays in pickles of protocol 5."""

    __slots__ = ()

    def __new__(cls, content: Any, dtype: Any, shape: Any, order: str) -> Any:
        array = _Array()
        array.__setstate__((1, shape, dtype, order == "F", content))
        return array


class _Encode(_Sealed):
    """In place of _codecs.encode, by which Python 3 writes bytes in protocol 2."""

    __slots__ = ()

    def __new__(cls, text: Any, encoding: Any = "latin1") -> Any:
        if encoding != "latin1":  # other codecs unpack archives
            raise pickle.UnpicklingError(f"text encoded by {encoding!r}")
        return text.encode("latin1")


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
    "numpy.core.numeric._frombuffer": _Buffer,
    "numpy._core.numeric._frombuffer": _Buffer,
    "_codecs.encode": _Encode,
}


class _Refused(Exception):
    """A pickle names something it has no business with."""


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in ARRAYS:
            raise _Refused(full_name)
        return ARRAYS[full_name]


def load_table(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Some columns of a pickled dict of plain values and NumPy arrays, of any pickle protocol.

    Args:
        path: of the pickle.
        keys: the columns wanted; in the file they are str or bytes.

    Returns:
        key -> value. Arrays are read-only; bytes in lists become str.

    Raises:
        DataError: the file is missing or damaged, lacks a key, or names anything but NumPy's
            arrays, which are not called then.
    """
    try:
        with open(path, "rb") as file:
            # bytes: strings of Python 2 are either, and 150 MB of pixels need no decoding
            table = _TableUnpickler(file, encoding="bytes").load()
        columns = {_text(key): value for key, value in table.items()}
        return {key: _plain(columns[key]) for key in keys}
    except _Refused as refused:
        raise DataError(
            f"{path}: it asks to call {refused}, which no data set needs; nothing was run. Do not "
            "trust where this file came from, fetch the set from its official address"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror or error})") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as it has opcodes
        raise DataError(
            f"{path}: this is not the expected pickled dict with {', '.join(keys)} "
            f"({type(error).__name__}: {error}); fetch it again"
        ) from error


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.build()
    if isinstance(value, list | tuple):
        return [_text(item) if isinstance(item, bytes) else item for item in value]
    return value
