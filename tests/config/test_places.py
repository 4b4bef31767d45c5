"""Where configs, `_BASE_` files and data are found, in any working directory and installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lg
from lg import paths
from tests.config.config_cases import Write, fault

ROOT = Path(__file__).parents[2]
OURS = "configs/deit/deit-ti_c100_ours.yaml"


@pytest.fixture(name="elsewhere")
def elsewhere_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory outside the repository."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_config_of_the_project_is_found_in_any_working_directory(elsewhere: Path) -> None:
    cfg = lg.load_config(OURS)
    assert cfg == lg.load_config(ROOT / OURS) and cfg.OUT_DIR == "work_dirs/deit-ti_c100_ours"
    assert f"Did you mean {OURS} or" in fault("configs/deit/deit-ti_c100_our.yaml")


def test_the_working_directory_comes_before_the_project(elsewhere: Path) -> None:
    own = elsewhere / OURS
    own.parent.mkdir(parents=True)
    own.write_text("RNG_SEED: 77")
    assert lg.load_config(OURS).RNG_SEED == 77


def test_a_base_of_the_project_is_named_from_any_folder(
    write: Write, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(f"_BASE_: [{OURS}]\nMODEL: {{NUM_CLASSES: 2}}", "deep/er/run.yaml")
    cfg = lg.load_config(path)
    assert (cfg.MODEL.NUM_CLASSES, cfg.TRANSFORMER.HIDDEN_DIM) == (2, 192)
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        assert lg.load_config(path).TRANSFORMER == cfg.TRANSFORMER
    # The file's own folder comes first.
    write("TRANSFORMER: {HIDDEN_DIM: 64}", f"deep/er/{OURS}")
    assert lg.load_config(path).TRANSFORMER.HIDDEN_DIM == 64
    text = fault(write("_BASE_: configs/deit/none.yaml", "run.yaml"))
    assert "configs/deit/none.yaml (named by _BASE_ in " in text and "No such file" in text


def test_data_is_that_of_the_working_directory_and_then_of_the_repository(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = elsewhere.parent / "repository"
    (repository / "data").mkdir(parents=True)
    monkeypatch.setattr(paths, "project_folder", lambda: repository)
    config = ROOT / OURS
    found = lg.load_config(config).DATA_LOADER.ROOT
    assert found == str(repository / "data")
    assert lg.load_config(config, ["DATA_LOADER.ROOT", "mine"]).DATA_LOADER.ROOT == "mine"
    (elsewhere / "data").mkdir()
    assert lg.load_config(config).DATA_LOADER.ROOT == "data"


def test_run_net_works_from_any_working_directory(elsewhere: Path) -> None:
    command = [sys.executable, ROOT / "run_net.py", "--mode", "info", "--cfg"]
    run = subprocess.run(
        [*command, "configs/digits/vit_digits_ours.yaml"], capture_output=True, text=True
    )
    assert "678,634 parameters" in run.stdout, run.stderr
    assert list(elsewhere.iterdir()) == []


def test_the_configs_are_part_of_an_installed_package(elsewhere: Path) -> None:
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    source = elsewhere.parent / "source"
    source.mkdir()
    for name in ("lg", "configs"):
        (source / name).symlink_to(ROOT / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "requirements.txt", "run_net.py"):
        (source / name).symlink_to(ROOT / name)
    (source / "precompute_feature.py").symlink_to(ROOT / "precompute_feature.py")
    subprocess.run(
        [sys.executable, "-c", build, elsewhere], cwd=source, check=True, capture_output=True
    )
    (wheel,) = elsewhere.glob("*.whl")
    site = elsewhere / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    own = elsewhere / "own.yaml"
    own.write_text(f"_BASE_: {OURS}\nRNG_SEED: 3")
    code = "import lg; print(lg.__file__, lg.load_config('own.yaml').TRANSFORMER.HIDDEN_DIM)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code]
        if sys.version_info >= (3, 11)
        else [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == [str(site / "lg/__init__.py"), "192"], run.stderr
