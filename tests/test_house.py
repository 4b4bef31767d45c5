"""The rules of the house: who may see the config, what every config resolves to, quick answers."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import lg
from lg.builders import build_model

ROOT = Path(__file__).parents[1]
SEES_CONFIG = {"run_net.py", "lg/config.py", "lg/builders.py", "lg/trainer.py"}
LEAVES = sorted(
    p.relative_to(ROOT / "configs").as_posix()
    for p in (ROOT / "configs").rglob("*.yaml")
    if p.parent.name != "_base_"
)
# Parameters of the student (or the CNN) of each config, projection heads not counted.
PARAMETERS = {
    "deit/deit-1m_c100-tenth_base.yaml": 1_019_236,
    "deit/deit-1m_c100-tenth_ours.yaml": 1_019_236,
    "deit/deit-ti_c100_base.yaml": 5_543_716,
    "deit/deit-ti_c100_ours.yaml": 5_543_716,
    "deit/deit-ti_flowers_base.yaml": 5_544_102,
    "deit/deit-ti_flowers_ours.yaml": 5_544_102,
    "digits/r-8_digits.yaml": 78_042,
    "digits/vit_digits_base.yaml": 678_634,
    "digits/vit_digits_ours.yaml": 678_634,
    "resnet/r-18_c100.yaml": 11_227_812,
    "resnet/r-20_c100-tenth.yaml": 278_324,
    "resnet/r-56_c100.yaml": 861_620,
    "resnet/r-56_flowers.yaml": 861_750,
}


def names_in(path: Path) -> set[str]:
    """Every imported or used name in a source file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    return found | {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}


def test_the_config_stops_at_the_builders() -> None:
    files = [*(ROOT / "lg").rglob("*.py"), ROOT / "run_net.py"]
    seen = {p.relative_to(ROOT).as_posix() for p in files if {"CfgNode", "yacs"} & names_in(p)}
    assert seen == SEES_CONFIG


@pytest.mark.parametrize("name", LEAVES)
def test_every_config_builds_the_model_it_says(name: str) -> None:
    model = build_model(lg.load_config(ROOT / "configs" / name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_config_opens_with_what_it_is_and_its_command() -> None:
    for name in LEAVES:
        first, second, *_ = (ROOT / "configs" / name).read_text().splitlines()
        assert first.startswith("# ") and second.startswith("#"), name
        text = (ROOT / "configs" / name).read_text()
        assert f"python run_net.py --mode train --cfg configs/{name}" in text, name


def test_help_is_quick() -> None:
    # Processor time of the child: the clock on the wall also counts what else the machine does.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "run_net.py"), "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--cfg FILE" in out
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_a_fault_is_one_line_not_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "run_net.py", "--mode", "train", "--cfg", "configs/none.yaml"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("Error: Cannot read the config configs/none.yaml")
    assert len(run.stderr.strip().splitlines()) == 1
