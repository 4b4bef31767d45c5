"""Local copies of files given by path or URL."""

from __future__ import annotations

import os

URL_SCHEMES = ("http://", "https://", "ftp://")


def is_url(path: str) -> bool:
    """Tell whether a path is a URL, to download before it can be opened."""
    return path.lower().startswith(URL_SCHEMES)


def is_local_file(path: str) -> bool:
    """Tell whether a path is an existing file on this machine."""
    return not is_url(path) and os.path.isfile(os.path.expanduser(path))


def local_path(path: str, *, cache: str) -> str:
    """Return a path that can be opened; download a URL on first use.

    Args:
        path: A file path (~ is the home folder), or an http, https or ftp URL.
        cache: Folder for downloaded files.

    Raises:
        OSError: The download failed. The message names the URL.
    """
    if not is_url(path):
        return os.path.expanduser(path)
    # Imported here because most runs download nothing.
    from iopath.common.file_io import HTTPURLHandler, PathManager

    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    try:
        return manager.get_local_path(path, cache_dir=cache)
    except Exception as error:  # iopath passes on the errors of its transports
        raise OSError(f"Cannot download {path}: {error}") from error
