"""The documentation: the site builds without broken links and shows what the source says."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lg.config.defaults import DEFAULT_VALUES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A broken link or anchor, or a page that the menu lacks, fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return folder


def test_the_page_of_keys_lists_every_key_with_its_default(site: Path) -> None:
    page = (site / "config.html").read_text(encoding="utf-8")
    listed = re.findall(r'<span id="([A-Z0-9_.]+)">', page)
    assert listed == list(DEFAULT_VALUES)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    assert re.search(r"MODEL\.IMG_SIZE\s+224\s+side of the square input image, pixels", text)


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """It opens from the disk, without a network."""
    loads = re.compile(
        r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)|<link[^>]+href="(https?:[^"]+)'
    )
    found = {
        (page.name, match[0])
        for page in site.rglob("*.html")
        for match in loads.finditer(page.read_text(encoding="utf-8"))
    }
    assert found == set()
