"""What is packaged, and how the project is cited."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

import lg

ROOT = Path(__file__).parents[1]


def test_an_installation_is_typed_and_a_source_distribution_can_be_installed(
    tmp_path: Path,
) -> None:
    steps = ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    command = [sys.executable, "setup.py", "--quiet", *map(str, steps)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "lib/lg/py.typed").is_file()
    assert (tmp_path / "lib/lg/tools/doctor/checkup.py").is_file()
    assert (tmp_path / "lib/lg/tools/report/style.css").is_file()
    sources = (tmp_path / "lg.egg-info/SOURCES.txt").read_text().splitlines()
    # setup.py reads the first two.
    assert {"README.md", "requirements.txt", "lg/py.typed", "CITATION.cff"} < set(sources)
    assert "configs/_base_/data_digits.yaml" in sources


def test_the_citation_names_this_version_and_the_paper() -> None:
    """The required fields of the format: https://citation-file-format.github.io."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == lg.__version__
    assert f'version="{lg.__version__}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert [author["family-names"] for author in paper["authors"]] == (
        ["Li", "Yu", "Wang", "Yuan", "Song", "Chen"]
    )
    assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", paper["url"])
