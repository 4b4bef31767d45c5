"""The documentation: the site builds without broken links and shows what the source says."""

from __future__ import annotations

import ast
import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lg.config.defaults import DEFAULT_VALUES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


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


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {f"docs/{path.name}" for path in DOCS.glob("*.md")} - {"docs/index.md"}
    assert {page for page in pages if f"({page})" not in readme} == set()
    local = {link for link in re.findall(r"\]\(([^)#]+)", readme) if "://" not in link}
    assert {link for link in local if not (ROOT / link).exists()} == set()


def messages() -> str:
    """Return every text in the source, with … for each value that is filled in."""
    texts = []
    for path in (*(ROOT / "lg").rglob("*.py"), ROOT / "run_net.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_explained_messages_occur_in_the_source() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r"^> (.+)$", page, re.MULTILINE)
    assert len(quotes) > 25
    source = messages()
    assert [quote for quote in quotes if quote not in source] == []


def test_the_numbers_of_the_comparison_are_those_of_the_results() -> None:
    published = {"65.1", "78.2"}
    page = (DOCS / "when-to-use.md").read_text(encoding="utf-8")
    numbers = set(re.findall(r"\d+\.\d+", page)) - published
    assert len(numbers) > 8
    sources = (DOCS / name for name in ("results.md", "own-images.md"))
    results = " ".join(path.read_text(encoding="utf-8") for path in sources)
    assert {number for number in numbers if not re.search(rf"\b{number}\b", results)} == set()
