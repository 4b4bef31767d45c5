"""The rules of the house: who may see the config, quick answers, faults in one line."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SEES_CONFIG = {
    "precompute_feature.py",
    "run_net.py",
    "lg/builders/data.py",
    "lg/builders/models.py",
    "lg/builders/run.py",
    "lg/builders/training.py",
    "lg/config/combinations.py",
    "lg/config/load.py",
    "lg/tools/doctor/checkup.py",
    "lg/tools/info.py",
    "lg/tools/timing.py",
    "lg/trainer.py",
}


def names_in(path: Path) -> set[str]:
    """Every imported or used name in a source file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    return found | {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}


def test_the_config_stops_at_the_builders() -> None:
    files = [*(ROOT / "lg").rglob("*.py"), ROOT / "run_net.py", ROOT / "precompute_feature.py"]
    seen = {p.relative_to(ROOT).as_posix() for p in files if {"CfgNode", "yacs"} & names_in(p)}
    assert seen == SEES_CONFIG


@pytest.mark.parametrize("script", ["run_net.py", "precompute_feature.py"])
def test_help_is_quick(script: str) -> None:
    # Processor time of the child: the clock on the wall also counts what else the machine does.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / script), "--help"]
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
