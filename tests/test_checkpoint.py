"""Checkpoints: atomic writes, failed writes, and reading without running code."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lg.checkpoint import CheckpointFolder, choose_weights, read_checkpoint
from lg.errors import CheckpointError
from lg.files.atomic import write_atomically
from tests.checkpoint_cases import same_state, saved, small_state
from tests.fault_cases import files_up_to

ROOT = Path(__file__).parents[1]


def fault(path: str | Path) -> str:
    """Return the message of the CheckpointError raised by reading."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    text = str(caught.value)
    assert os.fspath(path) in text and "Traceback" not in text and "\n" not in text
    return text


# --- Writing -----------------------------------------------------------------------------------


def test_write_replaces_the_file_and_uses_the_default_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    for content in (b"old", b"new"):
        write_atomically(path, lambda stream, content=content: stream.write(content))
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == ["a.bin"]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)])
def test_error_during_a_write_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(stream: Any) -> None:
        stream.write(b"half of the")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert os.listdir(tmp_path) == ["a.bin"] and path.read_bytes() == b"old"
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "b.bin", write)
    assert os.listdir(tmp_path) == ["a.bin"]


def killed_in(work: Callable[[], object]) -> None:
    """Run `work` in a child process that it kills."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


class KilledOnPickling:
    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_kill_during_a_save_keeps_old_files_and_the_next_save_cleans_up(
    tmp_path: Path,
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(small_state(1), epoch=1, is_best=True)

    def save(is_best: bool) -> Callable[[], object]:
        state = {"model_state": torch.zeros(100_000), "last": KilledOnPickling()}
        return lambda: folder.save(state, epoch=1, is_best=is_best)

    killed_in(save(False))
    killed_in(save(True))
    left = [p for p in tmp_path.rglob(".partial-*")]
    assert left and folder.files() == [tmp_path / "checkpoints" / "model_epoch_0001.pyth"]
    for path in (folder.best, *folder.files()):
        assert same_state(read_checkpoint(path), small_state(1))
    state = folder.load_last(pytest.fail)
    assert state is not None and same_state(state, small_state(1))
    folder.save(small_state(2), epoch=2, is_best=False)
    assert not [p for p in tmp_path.rglob(".partial-*")]
    assert len(folder.files()) == 2


def test_clean_up_keeps_files_of_other_programs(tmp_path: Path) -> None:
    other = tmp_path / ".partial-features.pt-x1"
    other.touch()
    CheckpointFolder(tmp_path).save(small_state(), epoch=1, is_best=True)
    assert other.exists()


# --- Failed writes -----------------------------------------------------------------------------


def large_state(value: float = 1.0) -> dict[str, Any]:
    return {**small_state(value), "large": torch.full((50_000,), value)}  # 0.2 MB


@pytest.mark.parametrize("limit", [0, 1_000, 100_000, 199_000])
def test_disk_error_is_raised_instead_of_the_error_of_torch(tmp_path: Path, limit: int) -> None:
    path = saved(tmp_path / "a.pyth")
    state = large_state()
    with files_up_to(limit), pytest.raises(OSError, match=r"File too large.*a\.pyth'") as caught:
        write_atomically(path, lambda stream: torch.save(state, stream))
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert os.listdir(tmp_path) == ["a.pyth"] and same_state(read_checkpoint(path), small_state())


@pytest.mark.parametrize("is_best", [False, True])
def test_failed_save_changes_nothing_and_reports_how_to_resume(
    tmp_path: Path, is_best: bool
) -> None:
    folder = CheckpointFolder(tmp_path)
    for epoch in (1, 2):
        folder.save(small_state(epoch), epoch=epoch, is_best=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.pyth")}
    with files_up_to(100_000), pytest.raises(CheckpointError) as caught:
        folder.save(large_state(), epoch=3, is_best=is_best)
    free = shutil.disk_usage(tmp_path).free / 1e6
    text = str(caught.value)
    place = folder.best if is_best else folder.folder / "model_epoch_0003.pyth"
    head, _, rest = text.partition(" MB free). ")
    head, _, reported = head.rpartition(" (")
    assert head == f"{place} cannot be written: File too large"
    assert float(reported.replace(",", "")) == pytest.approx(free, rel=0.05)
    assert rest == (
        f"The last checkpoint, {folder.files()[-1]}, is intact: raise the file size limit "
        "(ulimit -f), then resume with the same command."
    )
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    folder.save(large_state(), epoch=3, is_best=is_best)
    assert len(folder.files()) == 2


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free space (TRAIN.KEEP_CHECKPOINTS 1 needs the least) or move"),
        (errno.EDQUOT, "free space (TRAIN"),
        (errno.EROFS, "make OUT_DIR writable"),
        (errno.EACCES, "make OUT_DIR writable"),
        (errno.EIO, "check the disk"),
        (errno.ENAMETOOLONG, "fix the cause"),
    ],
)
def test_each_disk_error_has_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def refuse(path: Path, write: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    folder = CheckpointFolder(tmp_path)
    monkeypatch.setattr("lg.checkpoint.write_atomically", refuse)
    with pytest.raises(CheckpointError) as caught:
        folder.save(small_state(), epoch=1, is_best=True)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/model.pyth cannot be written: {os.strerror(number)} (")
    assert f"No checkpoint was written before: {advice}" in text
    assert text.endswith(", then start again.") and "\n" not in text


def test_damaged_checkpoint_is_not_reported_as_intact(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for epoch in (1, 2):
        folder.save(small_state(epoch), epoch=epoch, is_best=False)
    folder.files()[-1].write_bytes(b"PK")
    with (
        files_up_to(1_000),
        pytest.raises(CheckpointError, match=r"0001\.pyth, is intact: r"),
    ):
        folder.save(large_state(), epoch=3, is_best=False)


def test_removed_folder_is_created_again(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    folder.save(small_state(1), epoch=1, is_best=True)
    shutil.rmtree(tmp_path / "run")
    assert same_state(read_checkpoint(folder.save(small_state(2), epoch=2, is_best=False)),
        small_state(2))  # fmt: skip


# --- Odd files among the checkpoints -----------------------------------------------------------


def at(epoch: int, step: int = 0) -> dict[str, Any]:
    """Return the state of a run after some epochs and steps."""
    return {**small_state(epoch), "sampler_state": {"epoch": epoch, "step": step}}


def test_checkpoint_named_after_another_epoch_is_skipped(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    path = folder.save(at(3), epoch=3, is_best=False)
    strange = folder.folder / "model_epoch_9999.pyth"
    shutil.copy(path, strange)
    warnings: list[str] = []
    state = folder.load_last(warnings.append)
    assert state is not None and state["sampler_state"]["epoch"] == 3
    assert warnings == [
        f"{strange} holds epoch 3: rename it to model_epoch_0003.pyth, or move it away. Skipping "
        "this checkpoint."
    ]
    folder.save(at(3, step=7), epoch=4, is_best=False)  # kept, although keep is 1
    assert [p.name[12:16] for p in folder.files()] == ["0004", "9999"]
    state = folder.load_last(warnings.append)
    assert state is not None and state["sampler_state"] == {"epoch": 3, "step": 7}


def test_damaged_later_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for epoch in (1, 2, 3):
        folder.save(at(epoch), epoch=epoch, is_best=False)
    for path in folder.files()[1:]:
        path.write_bytes(b"")
    folder.keep = 1
    folder.save(at(1, step=2), epoch=2, is_best=False)
    state = folder.load_last(lambda warning: None)
    assert state is not None and state["sampler_state"]["step"] == 2
    assert [p.name[12:16] for p in folder.files()] == ["0002", "0003"]


def test_folders_and_dangling_links_are_skipped(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(at(1), epoch=1, is_best=False)
    (folder.folder / "model_epoch_0002.pyth").mkdir()
    (folder.folder / "model_epoch_0003.pyth").symlink_to(tmp_path / "gone.pyth")
    warnings: list[str] = []
    state = folder.load_last(warnings.append)
    assert state is not None and state["sampler_state"]["epoch"] == 1
    assert "0003.pyth does not exist" in warnings[0]
    assert "0002.pyth cannot be read: Is a directory." in warnings[1] and len(warnings) == 2
    with pytest.raises(CheckpointError, match=r"Is a directory \(.*0001\.pyth, is intact: move"):
        folder.save(at(2), epoch=2, is_best=False)
    folder.save(at(3), epoch=3, is_best=False)  # replaces the link
    assert [p.name[12:16] for p in folder.files()] == ["0002", "0003"]
    assert not folder.files()[1].is_symlink() and folder.files()[0].is_dir()


# --- Reading -----------------------------------------------------------------------------------


def test_saved_checkpoint_is_read_back(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pyth")
    assert same_state(read_checkpoint(path), small_state())
    assert same_state(read_checkpoint(str(path)), small_state())


def test_missing_file_and_folder_are_reported(tmp_path: Path) -> None:
    assert "does not exist" in fault(tmp_path / "none.pyth")
    assert "cannot be read" in fault(tmp_path)
    with pytest.raises(CheckpointError, match="Cannot download"):
        read_checkpoint("http://127.0.0.1:1/model.pyth", cache=str(tmp_path))


def test_file_truncated_anywhere_is_rejected(tmp_path: Path) -> None:
    content = saved(tmp_path / "a.pyth").read_bytes()
    path = tmp_path / "b.pyth"
    for length in [*range(0, len(content), 61), len(content) - 1]:
        path.write_bytes(content[:length])
        fault(path)


def test_damaged_byte_never_changes_what_is_read(tmp_path: Path) -> None:
    content = saved(tmp_path / "a.pyth").read_bytes()
    path = tmp_path / "b.pyth"
    found = 0
    for position in [*range(0, len(content), 7), *range(content.index(b"PK\1\2"), len(content), 3)]:
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            state = read_checkpoint(path)
        except CheckpointError:
            found += 1
        else:  # a byte without content, such as tensor padding
            assert same_state(state, small_state())
    assert found > 200


def test_damaged_weight_is_reported(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pyth")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        wanted = next(n for n in names if n.endswith("/data/0"))
    content = bytearray(path.read_bytes())
    position = content.index(torch.full((20,), 1.0).numpy().tobytes()) + 40
    content[position] ^= 1  # one bit
    path.write_bytes(content)
    assert f"{wanted} is damaged" in fault(path)
    # Marked as a folder in the directory at the end, which holds no weights for torch then.
    path = saved(tmp_path / "c.pyth")
    content = bytearray(path.read_bytes())
    entry = content.index(b"c/data/0", content.index(b"PK\1\2")) - 46
    assert content[entry : entry + 4] == b"PK\1\2"
    content[entry + 38] |= 0x10
    path.write_bytes(content)
    assert "c/data/0" in fault(path)


class Payload:
    """Touch a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_payload_is_rejected_and_not_run(tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "a.pyth"
    state = {**small_state(), "optimizer_state": Payload(mark)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    text = fault(path)
    assert not mark.exists()
    assert "never loaded" in text
    if kind != "pickle":  # the same file does run under a loader that trusts it
        torch.load(path, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\3\4", b"\x80\x02}q\x00."])
def test_other_files_are_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pyth"
    path.write_bytes(content)
    fault(path)


@pytest.mark.parametrize("state", [[1, 2], torch.ones(3), "text", {}, 5])
def test_checkpoint_must_be_a_dict(tmp_path: Path, state: Any) -> None:
    text = fault(saved(tmp_path / "a.pyth", state))
    assert f"holds a {type(state).__name__}" in text


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64])
def test_numpy_numbers_of_a_published_file_are_read(tmp_path: Path, kind: type) -> None:
    state = {**small_state(), "test_err": kind(20), "ema_err": kind(10)}
    state["ema_state"] = {"w": torch.zeros(5, 4)}
    read = read_checkpoint(saved(tmp_path / "a.pyth", state))
    assert read["test_err"] == 20 and read["ema_err"] == 10
    assert torch.equal(choose_weights(read, "a")["w"], torch.zeros(5, 4))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numbers_of_numpy_1_and_2_are_read(tmp_path: Path, module: bytes) -> None:
    path = saved(tmp_path / "a.pyth", {**small_state(), "test_err": np.float64(20)})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            for old in (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"):
                part = part.replace(old, b"c" + module + b"\n")
            archive.writestr(name, part)
    assert b"c" + module + b"\nscalar" in path.read_bytes()
    assert read_checkpoint(path)["test_err"] == 20


def test_numpy_arrays_of_objects_are_rejected(tmp_path: Path) -> None:
    fault(saved(tmp_path / "a.pyth", {"a": np.array([Payload(tmp_path / "ran")], dtype=object)}))
    assert not (tmp_path / "ran").exists()
