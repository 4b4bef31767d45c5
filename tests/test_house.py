"""The rules of the house: layout, who sees the config, sizes, how commands start and end."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in (*(ROOT / "lg").rglob("*.py"), ROOT / "run_net.py", ROOT / "precompute_feature.py")
}
ROOMS = {"augment", "builders", "config", "datasets", "distributed", "files", "guidance", "logs"}
ROOMS |= {"models", "tools"}
MODULES = {"checkpoint", "device", "errors", "metrics", "optim", "paths", "run", "signals", "step"}
MODULES |= {"__init__", "trainer"}
SEE_CONFIG = ("run_net.py", "precompute_feature.py", "lg/config/", "lg/builders/", "lg/tools/")
SEE_CONFIG += ("lg/trainer.py",)
MAX_FUNCTION, MAX_FILE = 60, 385  # lines


def imports(tree: ast.AST) -> set[tuple[str, str]]:
    """Every (module, name) that a source file imports; the name is empty for `import module`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
    return found


def test_the_package_has_the_rooms_and_modules_of_the_design() -> None:
    inside = {path.relative_to("lg") for path in map(Path, SOURCES) if path.parts[0] == "lg"}
    assert {path.parts[0] for path in inside if len(path.parts) > 1} == ROOMS
    assert {path.stem for path in inside if len(path.parts) == 1} == MODULES


def test_the_config_stops_at_the_builders() -> None:
    seen = {path for path, tree in SOURCES.items() if "yacs" in str(imports(tree))}
    assert {"run_net.py", "lg/trainer.py", "lg/config/load.py"} < seen
    assert [path for path in seen if not path.startswith(SEE_CONFIG)] == []


def test_the_tools_are_used_by_commands_only() -> None:
    users = {
        path
        for path, tree in SOURCES.items()
        if any(
            f"{module}.{name}".startswith(("lg.tools", "lg.trainer"))
            for module, name in imports(tree)
        )
    }
    assert [path for path in users if not path.startswith(("run_net.py", "lg/t"))] == []


def test_errors_come_from_one_module() -> None:
    imported = {
        (path, module)
        for path, tree in SOURCES.items()
        for module, name in imports(tree)
        if name.endswith("Error") and module.startswith("lg.")
    }
    assert {module for _, module in imported} == {"lg.errors"}
    defined = {
        path
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and re.fullmatch("[A-Z].*Error", node.name)
    }
    assert defined == {"lg/errors.py"}


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    first = function.body[1 if ast.get_docstring(function) and len(function.body) > 1 else 0]
    return (function.end_lineno or 0) - first.lineno + 1


def test_functions_and_files_are_short() -> None:
    long = {
        f"{path}: {node.name}": body_lines(node)
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and body_lines(node) > MAX_FUNCTION
    }
    assert long == {}
    sizes = {path: len((ROOT / path).read_text().splitlines()) for path in SOURCES}
    assert {path: size for path, size in sizes.items() if size > MAX_FILE} == {}


@pytest.mark.parametrize("script", ["run_net.py", "precompute_feature.py"])
def test_help_is_fast(script: str) -> None:
    # CPU time of the child, because wall time depends on the load of the machine.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / script), "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--cfg FILE" in out
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
