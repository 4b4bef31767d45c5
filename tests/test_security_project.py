"""Security of the project itself: configs, files of a run, source, dependencies."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lg
from lg.errors import ConfigError
from lg.logs.log import json_line, read_json_lines
from tests.test_security import DIGITS, ROOT, SMALL
from tests.test_security import mark_fixture as mark_fixture

# --- Configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["LAUNCH.NAME", "LAUNCH.COMMENT", "LAUNCH.PARTITION", "LAUNCH.GPU_TYPE", "LAUNCH.EMAIL"]
)
def test_configs_add_no_lines_to_a_job(mark: Path, key: str) -> None:
    """submitit quotes the values behind `#SBATCH`, but a new line ends a shell comment."""
    config = mark.parent / "job.yaml"
    section, _, name = key.partition(".")
    for line_end in ("\n", "\r", "\x0b", "\x85", "\x1b[2K"):
        text = f"x{line_end}touch {mark}{line_end}#"
        config.write_text(f"{section}: {{{name}: {json.dumps(text)}}}")
        with pytest.raises(ConfigError, match=rf"{key} is .* without control characters"):
            lg.load_config(config)


def test_texts_of_a_config_run_no_code(mark: Path) -> None:
    config = mark.parent / "run.yaml"
    for text in (f"__import__('os').system('touch {mark}')", f"$(touch {mark})", f"`touch {mark}`"):
        config.write_text(f"DESC: {json.dumps(text)}\nOUT_DIR: {json.dumps(text)}")
        cfg = lg.load_config(config, ["LAUNCH.NAME", text])
        assert (text, text, text) == (cfg.DESC, cfg.OUT_DIR, cfg.LAUNCH.NAME)


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "hf_hub:evil/model", "local-dir:{0}"])
def test_models_are_not_loaded_from_elsewhere(mark: Path, name: str) -> None:
    """timm can build models that a repository or folder describes; only its own are accepted."""
    config = mark.parent / "run.yaml"
    config.write_text(f"MODEL: {{TYPE: {json.dumps('timm/' + name.format(mark.parent))}}}")
    with pytest.raises(ConfigError, match=r"timm .* has no "):
        lg.build_model(lg.load_config(config))


# --- What a run writes -------------------------------------------------------------------------


def test_names_forge_no_log_lines(tmp_path: Path) -> None:
    forged = 'x\njson_stats: {"_type": "test_epoch", "test_err": 0.0}\r\x1b[2K\x85\u2028'
    line = json_line("train_iter", {"name": forged})
    (tmp_path / "log.txt").write_text(f"{line}\n", encoding="utf-8")
    assert re.search("[\x00-\x1f\x7f-\x9f\u2028]", line) is None
    assert read_json_lines(tmp_path / "log.txt") == [{"_type": "train_iter", "name": forged}]


def test_a_run_writes_no_environment_variables(tmp_path: Path) -> None:
    secret = "b7e3-secret-of-the-environment"
    opts = [*SMALL, "OUT_DIR", tmp_path / "out", "TRAIN.BATCH_SIZE", 60, "OPTIM.MAX_EPOCH", 1]
    command = [sys.executable, "run_net.py", "--mode", "train", "--cfg", DIGITS / "r-8_digits.yaml"]
    environment = {**os.environ, "LG_SECRET": secret, "AWS_SECRET_ACCESS_KEY": secret}
    run = subprocess.run(
        [str(part) for part in (*command, *opts)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"model.pyth", "model_epoch_0001.pyth", "log.txt", "config.yaml"} <= names
    assert any("tfevents" in name for name in names)
    contents = [path.read_bytes() for path in files] + [(run.stdout + run.stderr).encode()]
    assert not any(secret.encode() in c or b"LG_SECRET" in c for c in contents)


# --- The source --------------------------------------------------------------------------------

# Functions that run their argument, or unpack it anywhere, by the last part of their name.
DANGEROUS = {"exec", "system", "popen", "Popen", "check_output", "check_call", "extractall"}
DANGEROUS |= {
    "unpack_archive",
    "unsafe_load",
    "full_load",
    "Unpickler",
    "run_path",
    "import_module",
    "resolve_name",
}
# Functions that are safe with this argument.
GUARDED = {"torch.load": ("weights_only", "True"), "yaml.load": (1, "_Loader")}
# It imports modules of this project, by names written in its source.
SAFE = {"lg/__init__.py: importlib.import_module", "run_net.py: pkgutil.resolve_name"}


def is_dangerous(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name in GUARDED:
        where, wanted = GUARDED[name]
        given = dict(enumerate(call.args)) | {word.arg: word.value for word in call.keywords}
        return where not in given or ast.unparse(given[where]) != wanted
    if name.startswith(("pickle.", "subprocess.", "os.exec", "os.spawn", "marshal.", "shelve.")):
        return True
    if any(k.arg == "allow_pickle" or (k.arg == "shell") for k in call.keywords):
        return True
    return name.rpartition(".")[2] in DANGEROUS or name in ("eval", "compile", "__import__")


def test_the_source_has_no_call_that_runs_files() -> None:
    files = [*(ROOT / "lg").rglob("*.py"), ROOT / "run_net.py", ROOT / "precompute_feature.py"]
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {ast.unparse(node.func)}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and is_dangerous(node)
    }
    assert found == SAFE | {"lg/files/safe_pickle.py: pickle.UnpicklingError"}


# --- Dependencies ------------------------------------------------------------------------------


def requirements() -> list[str]:
    """Return the requirements of the project and its extras, as written."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    extras = [
        str(item.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign) and "EXTRAS" in ast.unparse(statement.targets)
        for node in ast.walk(statement)
        if isinstance(node, ast.List)
        for item in node.elts
        if isinstance(item, ast.Constant)
    ]
    return [*(ROOT / "requirements.txt").read_text(encoding="utf-8").split(), *extras]


def test_every_dependency_has_both_bounds() -> None:
    lines = requirements()
    assert len(lines) > 20
    loose = [x for x in lines if not re.fullmatch(r"[A-Za-z][\w-]*>=\d[\d.]*,<\d[\d.]*", x)]
    assert loose == []
