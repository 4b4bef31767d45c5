"""One run at a time in a folder, and whether the folder is writable."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lg.errors import CheckpointError

LOCK_NAME = ".lock"
_TIMEOUT = 5.0  # seconds; a run that was just stopped may still be ending
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # the file system does not support locks
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def lock_folder(out_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Create a run's folder and keep other runs out of it.

    The lock belongs to the process; a leftover lock file is harmless. The kernel releases the lock
    when the process ends, even if it is killed, and child processes do not inherit it. Processes on
    other machines are kept out if the file system shares its locks.

    Raises:
        CheckpointError: Another run holds the lock, or the folder is not writable.
    """
    folder = Path(out_dir)
    check_writable(folder)
    path = folder / LOCK_NAME
    lock = FileLock(path, timeout=_TIMEOUT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        holder = path.read_text(errors="replace").strip() or "unknown"
        raise CheckpointError(
            f"OUT_DIR {folder} is in use by another run ({holder}): wait for it, stop it, or set "
            "OUT_DIR to another folder."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise _not_writable(folder, folder, error) from None
    try:
        with contextlib.suppress(OSError):  # the name of the holder is optional
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        lock.release()


def check_writable(out_dir: str | os.PathLike[str]) -> None:
    """Check that files can be created in a run's folder, or that the folder can be created.

    A full disk passes.

    Raises:
        CheckpointError: The folder is not writable.
    """
    folder = Path(out_dir)
    for place in (existing_folder(folder), existing_folder(folder / "checkpoints")):
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            if error.errno not in _FULL:
                raise _not_writable(folder, place, error) from None


def existing_folder(folder: Path) -> Path:
    """Return the folder itself, or the nearest parent that exists."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if os.path.lexists(each))


def _not_writable(folder: Path, place: Path, error: OSError) -> CheckpointError:
    if isinstance(error, NotADirectoryError):
        return CheckpointError(f"OUT_DIR is {folder}, but {place} is a file: name a folder.")
    return CheckpointError(
        f"OUT_DIR {folder} is not writable: {error.strerror} in {place}. Make it writable, or set "
        "OUT_DIR to another folder."
    )
