"""The folder of a run belongs to one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lg.errors import CheckpointError

LOCK_NAME = ".lock"
_PATIENCE = 5.0  # seconds that a run which was just stopped may take to end
_TAKEN = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def claim(out_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps a run's folder to this process, until it ends in whatever way.

    The lock is the process's, not the file's that stays: the kernel drops it when the process is
    killed, and processes that it started (readers of images) do not hold it. Across machines it
    holds as far as the file system has locks. Within one process nothing is locked out.

    Raises:
        CheckpointError: another run has it, or nothing can be written there.
    """
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(_not_writable(folder, error)) from None
    try:
        if not _locked(handle):
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
            raise CheckpointError(
                f"OUT_DIR is {folder}, where another run is under way ({holder}); two would mix "
                "their logs and checkpoints. Wait for it, stop it, or set OUT_DIR to another "
                "folder."
            )
        with contextlib.suppress(OSError):  # a full disk is no matter yet
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _check_writable(folder)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    """Waits a little for the lock; where the file system has none, there is nothing to wait for."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _TAKEN:
                return True
        else:
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def _check_writable(folder: Path) -> None:
    for place in (folder, folder / "checkpoints"):
        if place.is_dir():
            try:
                tempfile.TemporaryFile(dir=place).close()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise CheckpointError(_not_writable(place, error)) from None


def _not_writable(folder: Path, error: OSError) -> str:
    return (
        f"OUT_DIR: nothing can be written in {folder}: {error.strerror}. Make it writable, or set "
        "OUT_DIR to another folder."
    )
