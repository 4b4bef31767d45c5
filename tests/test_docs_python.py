"""The Python code of the docs runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lg

ROOT = Path(__file__).parents[1]


def python_blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_python_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = python_blocks("api.md")
    guide = lg.build_model(lg.load_config(ROOT / "configs/resnet/r-56_c100.yaml"))
    monkeypatch.chdir(tmp_path)
    place = Path("work_dirs/r-56_c100/model.pyth")
    place.parent.mkdir(parents=True)
    torch.save(lg.published_state_dict(guide), place)
    names = {"images": torch.zeros(2, 3, 224, 224)}
    exec(code, names)
    assert names["logits"].shape == (2, 10)
    assert [tuple(each.shape) for each in names["maps"]] == [(2, 192, 14, 14)] * 3
    assert names["attention"].shape == (2, 3, 197, 197)
    assert len(names["student"].heads) == 3


def test_the_page_names_the_whole_surface() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert {name for name in lg.__all__ if f"lg.{name}" not in page} == set()
