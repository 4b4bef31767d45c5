"""Faults from outside: kills, a folder that another run has or that is read-only, full disks."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lg
import run_net
from lg.checkpoint import CheckpointFolder, read_checkpoint
from lg.errors import CheckpointError
from lg.files import lock as claiming
from lg.files.atomic import write_atomically
from lg.files.lock import claim

ROOT = Path(__file__).parents[1]


# --- One run a folder --------------------------------------------------------------------------


def holder(folder: Path, seconds: float = 60) -> tuple[int, int]:
    """A process that has claimed a folder for a while, and a child of it, as those that read images
    are."""
    get, put = os.pipe()
    process = os.fork()
    if process == 0:
        with claim(folder):
            reader = os.fork()
            if reader:
                os.write(put, b"%d\n" % reader)
            time.sleep(seconds if reader else 60)
        os._exit(0)
    os.close(put)
    with os.fdopen(get) as stream:
        return process, int(stream.readline())


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_folder_belongs_to_one_run_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, reader = holder(tmp_path)
    try:
        monkeypatch.setattr(claiming, "_PATIENCE", 0.2)
        with pytest.raises(CheckpointError) as caught, claim(tmp_path):
            pass
        text = str(caught.value)
        assert text.startswith(
            f"OUT_DIR is {tmp_path}, where another run is under way (process {process} on "
        )
        assert text.endswith("Wait for it, stop it, or set OUT_DIR to another folder.")
        with claim(tmp_path / "another"):
            pass
        end(process)
        os.kill(reader, 0)  # is still there
        with claim(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(reader, signal.SIGKILL)
    with claim(tmp_path):  # let go at the end of the other
        pass


def test_a_run_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    started = time.monotonic()
    process, reader = holder(tmp_path, seconds=0.5)
    with claim(tmp_path):
        assert 0.4 < time.monotonic() - started < claiming._PATIENCE
    os.kill(reader, signal.SIGKILL)
    os.waitpid(process, 0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(claiming.fcntl, "lockf", refuse)
    with claim(tmp_path):
        pass


@pytest.mark.parametrize("name", ["open", "mkdir"])
def test_a_folder_that_is_read_only_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "x")

    monkeypatch.setattr(os, name, refuse)
    with pytest.raises(CheckpointError) as caught, claim(tmp_path / "run"):
        pass
    assert str(caught.value) == (
        f"OUT_DIR: nothing can be written in {tmp_path}/run: Read-only file system. Make it "
        "writable, or set OUT_DIR to another folder."
    )


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointError, match=r"nothing can be written in .*/run: File exists"):
        claim(tmp_path / "run").__enter__()


# --- Runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guide as training would leave it, though with its first weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("guide") / "model.pyth"
    model = lg.build_model(lg.load_config(ROOT / "configs/digits/r-8_digits.yaml"))
    torch.save(lg.published_state_dict(model), path)
    return path


@pytest.fixture
def train(
    tmp_path: Path, guide_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], int | str | None]:
    """The command line of a short guided run; its exit status."""
    from benchmarks.fault_runs import training

    changes = {"DATA_LOADER__NUM_WORKERS": 0, "OPTIM__MAX_EPOCH": 3}
    argv = training(tmp_path / "run", guide_file, **changes).argv

    def run() -> int | str | None:
        monkeypatch.setattr(sys, "argv", argv)
        try:
            run_net.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


def test_a_disk_that_is_full_during_training_costs_nothing_but_time(
    tmp_path: Path,
    train: Callable[[], int | str | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out_dir = tmp_path / "run"

    def full(path: Path, write: Callable[[Any], object]) -> None:
        if path.name == "model_epoch_0003.pyth":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_atomically(path, write)

    with monkeypatch.context() as patch:
        patch.setattr("lg.checkpoint.write_atomically", full)
        assert train() == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and "epoch 3/3" in out and "Finished" not in out
    assert err.startswith(
        f"Error: {out_dir}/checkpoints/model_epoch_0003.pyth cannot be written: No space left on "
        "device. It takes 0."
    )
    last = out_dir / "checkpoints/model_epoch_0002.pyth"
    assert f"The last checkpoint, {last}, is whole: make room there" in err
    kept = {p: p.read_bytes() for p in CheckpointFolder(out_dir).files()}
    assert train() == 0
    out, err = capsys.readouterr()
    assert "Resuming after epoch 2 of 3." in out and "Finished 3 epochs" in out and err == ""
    assert last.read_bytes() == kept[last] and not [*out_dir.rglob(".partial-*")]


def test_a_run_outlives_its_folder(
    tmp_path: Path, train: Callable[[], int | str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lg import trainer

    out_dir, test = tmp_path / "run", trainer.evaluate

    def removed(*args: Any, **kwargs: Any) -> Any:
        if (out_dir / "checkpoints/model_epoch_0002.pyth").exists():
            out_dir.rename(tmp_path / "gone")
        return test(*args, **kwargs)

    monkeypatch.setattr(trainer, "evaluate", removed)
    assert train() == 0
    names = [p.name for p in CheckpointFolder(out_dir).files()]
    assert names == ["model_epoch_0003.pyth"]
    log = (out_dir / "log.txt").read_text()
    assert '"epoch": "3/3"' in log and "Finished 3 epochs" in log and "Resuming" not in log
    assert [*(out_dir / "tensorboard").iterdir()]
    assert read_checkpoint(out_dir / "checkpoints/model_epoch_0003.pyth")["epoch"] == 2


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/faults.py", "--kills", "6", "--only-kills"]
    run = subprocess.run(
        [*command, "--out", str(tmp_path / "faults.json")], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert {name: (row["tries"], row["survived"], row["lost"]) for name, row in rows.items()} == {
        f"kill -9, {phase}": (1, 1, 0)
        for phase in ("start-up", "step", "log", "save", "test", "precompute")
    }
