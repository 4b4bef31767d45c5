"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPORARY = ".partial-"


def write_atomically(path: str | os.PathLike[str], write: Callable[[Any], object]) -> None:
    """Write a file through a temporary file beside it, which is synced and then renamed.

    At any moment, `path` holds either its old content or all of the new content. If an error is
    raised, the temporary file is removed.

    Args:
        path: The file. Missing folders are created.
        write: Called with the binary stream to write to.

    Raises:
        OSError: The file cannot be written; names `path`. Also raised if `write` hides the error of
            the disk behind another exception, as torch.save does.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    file: _File | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _File(temporary, "xb")
        with io.BufferedWriter(file) as stream:
            write(stream)
            stream.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if file is not None:
            temporary.unlink(missing_ok=True)
            if file.error is not None and isinstance(error, Exception):
                error = file.error
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove the temporary files of `path` left by a process killed in `write_atomically`."""
    path = Path(path)
    for leftover in path.parent.glob(f"{TEMPORARY}{path.name}-*"):
        leftover.unlink(missing_ok=True)


class _File(io.FileIO):
    """A file that remembers the error of a failed write."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


class GrowingFile:
    """A file that is appended to, in pieces that are there at once and whole, or not at all.

    A file that was removed or moved away, its folder too, is made again. What cannot be written is
    lost; nothing here ends a run.
    """

    def __init__(self, path: str | os.PathLike[str], *, header: bytes = b"") -> None:
        """Opens nothing yet.

        Args:
            path: of the file.
            header: the first bytes of an empty file.
        """
        self.path = Path(path)
        self._header = header
        self._file: io.FileIO | None = None

    def append(self, piece: bytes) -> OSError | None:
        """Appends; returns what the disk refused, None when it is written."""
        try:
            if self._file is not None and not self._is_in_place(self._file):
                self.close()
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = io.FileIO(self.path, "ab")
            return self._write(self._file, piece)
        except OSError as error:
            return error

    def close(self) -> None:
        """Closes the file; a later `append` opens it again."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _is_in_place(self, file: io.FileIO) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file.fileno()))
        except FileNotFoundError:
            return False

    def _write(self, file: io.FileIO, piece: bytes) -> OSError | None:
        """A full disk may take the beginning of a piece; that is taken back."""
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            piece = self._header + piece
        written = 0
        try:
            while written < len(piece):
                written += file.write(piece[written:]) or 0
        except OSError as error:
            if written:
                file.truncate(size)
            return error
        return None
