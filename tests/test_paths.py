"""Paths: local files, cached downloads, and errors of failed downloads."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import lg
from lg import paths
from lg.errors import ConfigError
from lg.paths import is_url, local_path, source_commit


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve one config with its base and count the requests."""

    num_requests = 0

    def do_GET(self) -> None:
        type(self).num_requests += 1
        found = self.path in ("/configs/run.yaml", "/configs/base.yaml")
        text = {
            "/configs/run.yaml": b"_BASE_: base.yaml\nRNG_SEED: 7\n",
            "/configs/base.yaml": b"RNG_SEED: 5\nLOG_PERIOD: 3\n",
        }.get(self.path, b"")
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    """Yield the address of a server on this machine."""
    Handler.num_requests = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_urls_are_told_from_paths() -> None:
    for url in ("http://a/b", "https://a/b", "ftp://a/b", "HTTPS://a/b"):
        assert is_url(url)
    for path in ("a/b.yaml", "/a", "~/a", "http:/a", "file://a", "", "C:\\a", "x/http://a"):
        assert not is_url(path)


def test_a_path_is_returned_with_the_home_folder_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_path("a/../b c.pyth", cache="none") == "a/../b c.pyth"
    assert local_path("~/w.pyth", cache="none") == "/home/somebody/w.pyth"
    assert not Path("none").exists()


def test_a_url_is_downloaded_once_into_the_cache(server: str, tmp_path: Path) -> None:
    url = f"{server}/configs/base.yaml"
    first = local_path(url, cache=str(tmp_path / "cache"))
    assert tmp_path / "cache" in Path(first).parents
    assert Path(first).read_text() == "RNG_SEED: 5\nLOG_PERIOD: 3\n"
    assert local_path(url, cache=str(tmp_path / "cache")) == first
    assert Handler.num_requests == 1
    other_host = url.replace("127.0.0.1", "localhost")
    assert local_path(other_host, cache=str(tmp_path / "cache")) != first
    assert Handler.num_requests == 2


def test_a_failed_download_names_the_url(server: str, tmp_path: Path) -> None:
    for url in (f"{server}/none.pyth", "http://127.0.0.1:1/none.pyth", "http://[/none.pyth"):
        with pytest.raises(OSError, match="Cannot download ") as caught:
            local_path(url, cache=str(tmp_path))
        assert str(caught.value).startswith(f"Cannot download {url}: ")
    assert [p for p in tmp_path.rglob("*.pyth") if p.is_file()] == []


def test_a_config_by_url_finds_its_base_next_to_it(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lg.config.load.DEFAULTS, "DOWNLOAD_CACHE", str(tmp_path))
    cfg = lg.load_config(f"{server}/configs/run.yaml")
    assert (cfg.RNG_SEED, cfg.LOG_PERIOD, cfg.OUT_DIR) == (7, 3, "work_dirs/run")
    with pytest.raises(ConfigError, match=r"Cannot read the config http.*/none\.yaml: .*404"):
        lg.load_config(f"{server}/configs/none.yaml")


def test_the_commit_is_read_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "project_folder", lambda: tmp_path / "code")
    assert source_commit() == ""  # an installation
    git = tmp_path / "code/.git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\n11ab refs/heads/other\n22cd refs/heads/main\n")
    assert source_commit() == "22cd"
    (git / "refs/heads/main").write_text("33ef\n")
    assert source_commit() == "33ef"
    worktree = git / "worktrees/second"
    worktree.mkdir(parents=True)
    (worktree / "HEAD").write_text("ref: refs/heads/main\n")
    (worktree / "commondir").write_text("../..\n")
    (tmp_path / "second").mkdir()
    (tmp_path / "second/.git").write_text(f"gitdir: {worktree}\n")
    monkeypatch.setattr(paths, "project_folder", lambda: tmp_path / "second")
    assert source_commit() == "33ef"
    (worktree / "HEAD").write_text("44aa\n")  # no branch
    assert source_commit() == "44aa"
