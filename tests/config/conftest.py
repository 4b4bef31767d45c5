"""Fixtures of the config tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.config_cases import Write


@pytest.fixture(name="write")
def write_fixture(tmp_path: Path) -> Write:
    """A function that writes a config file in a folder and returns its path."""

    def write_file(text: str | bytes = "", name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file
