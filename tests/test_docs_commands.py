"""Every command in README and docs: its mode, files, keys and options exist and fit together.

Commands are parsed and their configs loaded, but nothing is trained. `pytest -m slow` runs those
that need nothing but the digits.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import lg
import precompute_feature
import run_net
from lg.config.defaults import DEFAULT_VALUES

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), ROOT / "data/README.md", *(ROOT / "docs").glob("*.md")]
# Programs that are not part of the project, or change the reader's shell.
OTHER_PROGRAMS = ("cd", "git", "ls", "open", "pip", "python", "source", "unzip")
# Why the slow test does not run a command: the first pattern that it contains.
NOT_RUN = {
    "torchrun|LAUNCH.MODE": "needs several GPUs, machines or a cluster; see tests/distributed",
    "NUM_GPUS [2-9]": "needs several GPUs",
    "LOG_TRACKER": "needs a package that the tests do without; see tests/logs",
    r"my_(images|flowers)|my\.yaml|photo|OUT_DIR/|FILE|GUIDE|work_dirs/RUN": "needs other files",
    "benchmarks/": "takes minutes to hours; see tests/benchmarks",
    "^(make|pip|git|source|cd) |-m pytest|-m mkdocs": "installs or runs tests",
    "python -c": "checks the reader's machine",
    r"KEY VALUE|\bMODE\b|PATTERN|\.\.\.": "describes the form of a command",
    "configs/(?!digits)": "needs a data set or trained weights, and hours",
}


def commands(page: Path) -> list[str]:
    """Return the commands of a page: lines of its shell blocks, and inline code that starts one."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shell = [block for language, block in fences if language in ("", "bash", "sh", "console")]
    lines = [
        part.strip().removeprefix("$ ")
        for block in shell
        for line in block.replace("\\\n", " ").splitlines()
        for part in line.split(" && ")
    ]
    starts = re.compile(r"(\w+=\S+ )*(python|torchrun|make|pip|git|source|cd|\S*/python) ")
    inline = re.findall(
        r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    )
    return [line for line in (*lines, *inline) if starts.match(f"{line} ")]


CASES = [
    pytest.param(command, id=f"{page.name}: {command[:60]}")
    for page in sorted(PAGES)
    for command in dict.fromkeys(commands(page))
    if page.name != "CHANGELOG.md"
]


def check_config(path: str | None, opts: list[str]) -> None:
    """Load a config with overrides; where the reader makes the config, check the keys."""
    opts = [word for word in opts if word != "..."]
    if path is not None and path.startswith("configs/"):
        lg.load_config(ROOT / path, opts)
        return
    assert len(opts) % 2 == 0
    assert set(opts[::2]) <= set(DEFAULT_VALUES)


def check_run_net(words: list[str]) -> None:
    args = run_net.parse_args(["train" if word == "MODE" else word for word in words])
    mode = run_net.MODES[args.mode]
    if mode.config == "none":
        return
    if mode.config == "loaded":
        check_config(args.cfg, args.opts)
        return
    if args.cfg is not None and args.cfg.startswith("configs/"):
        lg.load_config(ROOT / args.cfg)
    assert set(args.opts[::2]) <= set(DEFAULT_VALUES)


def check_precompute(words: list[str]) -> None:
    args = precompute_feature.parse_args(words)
    check_config(args.cfg, args.opts)


def check_script(script: str, words: list[str]) -> None:
    """Check that a script exists and declares the options, and that its configs exist."""
    source = (ROOT / script).read_text(encoding="utf-8")
    options = [word for word in words if word.startswith("--")]
    assert [option for option in options if f'"{option}"' not in source] == []
    assert [
        word for word in words if word.startswith("configs/") and not (ROOT / word).exists()
    ] == []
    keys = [word for word in words if re.fullmatch(r"[A-Z]+\.[A-Z_]+", word)]
    assert set(keys) <= set(DEFAULT_VALUES)


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(words) <= set(targets)


def check_pip(words: list[str]) -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    named = re.findall(r"[\w-]+", " ".join(re.findall(r"\[([^]]*)\]", " ".join(words))))
    assert [name for name in named if f'"{name}": [' not in setup] == []


def check(command: str) -> None:
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # environment variables
        words = words[1:]
    program, rest = words[0].rpartition("/")[2], words[1:]
    if program == "torchrun":
        script = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        program, rest = "python", rest[script:]
    if program == "make":
        return check_make(rest)
    if program == "pip" or rest[:2] == ["-m", "pip"]:
        return check_pip(rest)
    if program != "python":
        assert program in OTHER_PROGRAMS
        return None
    if rest[0] == "-m":
        assert rest[1] in ("pytest", "mkdocs", "run_net")
        if rest[1] == "run_net":
            return check_run_net(rest[2:])
        assert [
            word for word in rest if word.startswith("tests/") and not (ROOT / word).exists()
        ] == []
        return None
    if rest[0] == "-c":
        compile(rest[1], "inline", "exec")
        return None
    kinds = {"run_net.py": check_run_net, "precompute_feature.py": check_precompute}
    name = rest[0].rpartition("/")[2]
    return kinds.get(name, partial(check_script, rest[0]))(rest[1:])


@pytest.mark.parametrize("command", CASES)
def test_the_command_is_valid(command: str) -> None:
    try:
        check(command)
    except SystemExit as error:  # argparse
        if error.code != 0:  # --help exits with 0
            pytest.fail(f"{command}: exit {error.code}")


CONFIGS = [
    pytest.param(block, id=f"{page.name} {number}")
    for page in PAGES
    if page.name != "extending.md"  # see test_docs_extending.py
    for number, block in enumerate(
        re.findall(r"^```yaml\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    )
]


@pytest.mark.parametrize("block", CONFIGS)
def test_the_config_can_be_loaded(block: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(block, encoding="utf-8")
    lg.load_config(tmp_path / "my.yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modes_and_keys_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modes = set(re.findall(r"--mode ([a-z]+)", text))
    assert modes <= set(run_net.MODES)
    sections = "|".join({key.partition(".")[0] for key in DEFAULT_VALUES if "." in key})
    keys = set(re.findall(rf"`((?:{sections})\.[A-Z0-9_]+)[ `]", text))
    assert keys <= set(DEFAULT_VALUES)


def test_the_readme_lists_every_mode() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| `--mode` |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(run_net.MODES)


def test_commands_are_found_and_checked() -> None:
    assert len(CASES) > 60
    for wrong in (
        "python run_net.py --mode tran --cfg configs/digits/vit_digits_base.yaml",
        "python run_net.py --mode train --cfg configs/digits/vit_digits_none.yaml",
        "python run_net.py --mode train --cfg configs/digits/vit_digits_base.yaml OPTIM.LR 1",
        "python run_net.py --mode predict --photos a.jpg TEST.WEIGHTS work_dirs/RUN/model.pyth",
        "python benchmarks/digits_demo.py --sedes 3",
        "python benchmarks/none.py",
        "make tests",
        "pip install -e '.[slrum]'",
    ):
        with pytest.raises((AssertionError, SystemExit, ValueError, OSError)):
            check(wrong)


def reason(command: str) -> str:
    """Return why a command is not run; empty if it is."""
    if "--mode info" in command and "configs/" in command:
        return ""  # needs no data
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), "")


RUN = [case for case in CASES if not reason(str(case.values[0]))]


def test_most_kinds_of_commands_are_run() -> None:
    commands = " ".join(str(case.values[0]) for case in RUN)
    assert {"train", "info", "keys", "sweep"} <= set(re.findall(r"--mode (\w+)", commands))


def start(command: str, folder: Path) -> None:
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    words[1] = str(ROOT / words[1])
    run = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of the three configs of the digits, shortened."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("r-8_digits", "vit_digits_base", "vit_digits_ours"):
        config = f"configs/digits/{name}.yaml OPTIM.MAX_EPOCH 2 OPTIM.WARMUP_EPOCHS 0"
        start(f"python run_net.py --mode train --cfg {config}", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_the_command_runs(command: str, trained: Path, tmp_path: Path) -> None:
    start(command, trained if "work_dirs/vit_digits" in command else tmp_path)
