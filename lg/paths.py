"""Local copies of files given by path or URL."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

URL_SCHEMES = ("http://", "https://", "ftp://")


def is_url(path: str) -> bool:
    """Tell whether a path is a URL, to download before it can be opened."""
    return path.lower().startswith(URL_SCHEMES)


def is_local_file(path: str) -> bool:
    """Tell whether a path is an existing file on this machine."""
    return not is_url(path) and os.path.isfile(os.path.expanduser(path))


def project_folder() -> Path:
    """Return the folder that contains `configs`: the repository, or the package if it is installed
    without it."""
    package = Path(__file__).parent
    return package if (package / "configs").is_dir() else package.parent


def source_commit() -> str:
    """Return the commit of the git repository that this code runs from; empty if there is none."""
    try:
        git = project_folder() / ".git"
        if git.is_file():  # a worktree
            git = git.parent / git.read_text().removeprefix("gitdir: ").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        shared = git / "commondir"
        common = git / shared.read_text().strip() if shared.is_file() else git
        name = head.removeprefix("ref: ")
        if (common / name).is_file():
            return (common / name).read_text().strip()
        lines = (common / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in lines if line.endswith(f" {name}")), "")
    except OSError:
        return ""


def find_config(path: str, *, name: str = "") -> str:
    """Return a path; if there is nothing, that of the config of this name in the project.

    So configs/deit/deit-ti_c100_ours.yaml can be named in any working directory.

    Args:
        path: The path.
        name: As it was written, if that is not the path.
    """
    name = name or path
    own = project_folder() / name
    is_named = name.startswith("configs/") and not os.path.exists(path)
    return str(own) if is_named and own.exists() else path


def find_data(path: str) -> str:
    """Return a path; if there is nothing, that of the folder of this name in the repository."""
    own = project_folder() / path
    return str(own) if not os.path.exists(path) and own.is_dir() else path


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
    # iopath names the file after the path of the URL alone, without its host.
    folder = os.path.join(cache, hashlib.sha256(path.encode()).hexdigest()[:16])
    try:
        return manager.get_local_path(path, cache_dir=folder)
    except Exception as error:  # iopath passes on the errors of its transports
        raise OSError(f"Cannot download {path}: {error}") from error
