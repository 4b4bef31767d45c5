"""Files that are written whole or not at all."""

from __future__ import annotations

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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode()))


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove the temporary files of `path`, whose name may be a pattern, that a process killed in
    `write_atomically` left."""
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
