"""External faults: kills, locked and read-only folders, full disks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import run_net
from lg.checkpoint import CheckpointFolder, read_checkpoint
from lg.errors import CheckpointError
from lg.files import lock
from lg.files.atomic import write_atomically
from lg.files.lock import check_writable, lock_folder

ROOT = Path(__file__).parents[1]


# --- The lock of a folder ----------------------------------------------------------------------


def locking_process(folder: Path, seconds: float = 60) -> tuple[int, int]:
    """Start a process that holds the lock of a folder, and a child of it, like a data worker."""
    get, put = os.pipe()
    process = os.fork()
    if process == 0:
        with lock_folder(folder):
            worker = os.fork()
            if worker:
                os.write(put, b"%d\n" % worker)
            time.sleep(seconds if worker else 60)
        os._exit(0)
    os.close(put)
    with os.fdopen(get) as stream:
        return process, int(stream.readline())


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_lock_is_exclusive_and_ends_with_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, worker = locking_process(tmp_path)
    try:
        monkeypatch.setattr(lock, "_TIMEOUT", 0.2)
        with pytest.raises(CheckpointError) as caught, lock_folder(tmp_path):
            pass
        text = str(caught.value)
        assert text.startswith(
            f"OUT_DIR {tmp_path} is in use by another run (process {process} on "
        )
        assert text.endswith("): wait for it, stop it, or set OUT_DIR to another folder.")
        with lock_folder(tmp_path / "another"):
            pass
        kill(process)
        os.kill(worker, 0)  # the child is still running
        with lock_folder(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(worker, signal.SIGKILL)
    with lock_folder(tmp_path):  # released when the context above was left
        pass


def test_lock_waits_for_a_run_that_is_ending(tmp_path: Path) -> None:
    started = time.monotonic()
    process, worker = locking_process(tmp_path, seconds=0.5)
    with lock_folder(tmp_path):
        assert 0.4 < time.monotonic() - started < lock._TIMEOUT
    os.kill(worker, signal.SIGKILL)
    os.waitpid(process, 0)


def failing(number: int) -> Mock:
    """Return a system call that fails."""
    return Mock(side_effect=OSError(number, os.strerror(number)))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with lock_folder(tmp_path):
        pass


@pytest.mark.parametrize(("name", "place"), [("open", ""), ("mkdir", "/run")])
def test_read_only_folder_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    monkeypatch.setattr(os, name, failing(errno.EROFS))
    with pytest.raises(CheckpointError) as caught, lock_folder(tmp_path / "run"):
        pass
    assert str(caught.value) == (
        f"OUT_DIR {tmp_path}/run is not writable: Read-only file system in {tmp_path}{place}. Make "
        "it writable, or set OUT_DIR to another folder."
    )


@pytest.mark.parametrize("name", ["run", "run/checkpoints"])
def test_file_in_place_of_a_folder_is_reported(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"OUT_DIR is .*/run, but .*/{name} is a file: "):
        lock_folder(tmp_path / "run").__enter__()


@pytest.mark.parametrize(
    ("number", "passes"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)]
)
def test_full_disk_is_not_taken_for_a_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", failing(number))
    with contextlib.nullcontext() if passes else pytest.raises(CheckpointError, match="Permission"):
        check_writable(tmp_path)


# --- Runs --------------------------------------------------------------------------------------


@pytest.fixture
def train(
    tmp_path: Path, guide_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], int | str | None]:
    """A short guided run on the command line; returns its exit status."""
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


def test_training_resumes_after_a_full_disk(
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
        "device ("
    )
    last = out_dir / "checkpoints/model_epoch_0002.pyth"
    assert f"The last checkpoint, {last}, is intact: free space" in err
    kept = {p: p.read_bytes() for p in CheckpointFolder(out_dir).files()}
    assert train() == 0
    out, err = capsys.readouterr()
    assert "Resuming after epoch 2 of 3." in out and "Finished 3 epochs" in out and err == ""
    assert last.read_bytes() == kept[last] and not [*out_dir.rglob(".partial-*")]


def test_training_continues_after_its_folder_is_removed(
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
def test_random_kills_lose_nothing(tmp_path: Path) -> None:
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
