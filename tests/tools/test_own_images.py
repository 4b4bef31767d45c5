"""The tutorial in docs/own-images.md: its commands run in order, on tiny images."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import run_net
from lg.tools.init import plan
from tests.tools.test_init import save_images

PAGE = Path(__file__).parents[2] / "docs/own-images.md"
CLASSES = ("daisy", "lotus", "passion_flower", "rose", "sunflower")


def commands() -> dict[str, list[str]]:
    """Return the words of the first command of each mode on the page."""
    blocks = re.findall(r"^```\n(python .*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    found: dict[str, list[str]] = {}
    for words in map(shlex.split, blocks):
        found.setdefault(words[words.index("--mode") + 1], words[1:])
    return found


def test_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CLASSES:
        save_images(tmp_path / "my_flowers/train" / name, 6, side=32)
        save_images(tmp_path / "my_flowers/test" / name, 2, side=32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "MAX_EPOCHS", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(mode: str) -> str:
        monkeypatch.setattr(sys, "argv", commands()[mode])
        run_net.main()
        return capsys.readouterr().out

    said = run("init")
    assert "5 classes; images: 30 in train, 10 in test." in said
    assert "--mode pipeline --cfg my_flowers_configs/my_flowers_deit-1m.yaml" in said
    said = run("pipeline")
    result = json.loads(Path("work_dirs/my_flowers_deit-1m_pipeline.json").read_text())
    assert list(result) == ["guide", "guided"] and result["guided"]["count"] == 10
    assert result["guided"]["model"] == "DeiT" and result["guide"]["model"] == "ResNet-56"
    words = commands()["predict"]
    weights = f"{result['guided']['folder']}/model.pyth"
    assert f"guided model {weights}" in said
    assert re.sub("-[0-9a-f]{8}/", "-HASH/", weights) == words[-1]
    monkeypatch.setattr(sys, "argv", [*words[:-1], weights])
    run_net.main()
    said = capsys.readouterr().out
    assert "rose" in said and "0.png" in said
