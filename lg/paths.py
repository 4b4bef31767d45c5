"""Local copies of files that are named by path or URL."""

from __future__ import annotations

import os
from pathlib import Path

URL_SCHEMES = ("http://", "https://", "ftp://")


def is_url(path: str) -> bool:
    """True for what has to be fetched before it can be opened."""
    return path.lower().startswith(URL_SCHEMES)


def is_local_file(path: str) -> bool:
    """True for what can be opened as it is."""
    return not is_url(path) and os.path.isfile(os.path.expanduser(path))


def local_path(path: str, *, cache: str) -> str:
    """The path itself, or the cached local copy of a URL, fetched on first use by iopath.

    Args:
        path: a file path (with ~ for the home folder), or an http, https or ftp URL.
        cache: folder that keeps fetched files.

    Raises:
        OSError: the URL could not be fetched; the message names it.
    """
    if not is_url(path):
        return os.path.expanduser(path)
    from iopath.common.file_io import (
        HTTPURLHandler,
        PathManager,
    )  # only when there is something to fetch

    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    try:
        return manager.get_local_path(path, cache_dir=str(Path(cache)))
    except Exception as error:  # iopath passes on whatever its transports raise
        raise OSError(f"Cannot fetch {path}: {error}") from error
