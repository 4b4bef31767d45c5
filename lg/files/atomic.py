"""Files that survive faults: those that appear whole or not at all, and those that only grow."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPORARY = ".partial-"


def write_atomically(path: str | os.PathLike[str], write: Callable[[Any], object]) -> None:
    """Calls `write(stream)` on a temporary file beside `path`, makes it durable, then renames it to
    `path`.

    Whatever happens, `path` holds either its old content or all of the new; no temporary file stays
    after an error.

    Raises:
        OSError: it cannot be written; names `path`. Also where `write` tells another fault instead,
            as torch.save does.
    """
    path = Path(path)
    disk: _Disk | None = None
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent)
        disk = _Disk(handle, "wb")
        with io.BufferedWriter(disk) as stream:
            write(stream)
            stream.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private to its owner
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        fault = disk.fault if disk and disk.fault and isinstance(error, Exception) else error
        if isinstance(fault, OSError) and fault.errno is not None:
            raise OSError(fault.errno, fault.strerror, os.fspath(path)) from None
        raise


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes what a process that was killed in `write_atomically` left beside `path`."""
    path = Path(path)
    for leftover in path.parent.glob(f"{TEMPORARY}{path.name}-*"):
        leftover.unlink(missing_ok=True)


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


class _Disk(io.FileIO):
    """Remembers what the disk refused."""

    fault: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.fault = error
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
