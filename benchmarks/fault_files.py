"""File and disk faults for benchmarks/faults.py."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import fault_runs as runs
from lg.checkpoint import CheckpointFolder, read_checkpoint
from lg.errors import CheckpointError

if TYPE_CHECKING:
    from benchmarks.faults import Bench


def damaged(bench: Bench, count: int) -> None:
    """Truncate the newest checkpoint or flip one of its bits at a random position."""
    for fault, (number, backend) in itertools.product(
        ("truncated checkpoint", "flipped bit in a checkpoint"),
        enumerate(itertools.islice(itertools.cycle(bench.whole), count)),
    ):
        out_dir = bench.folder / f"damaged_{number}"
        shutil.copytree(bench.whole[backend], out_dir)
        last = CheckpointFolder(out_dir).files()[-1]
        content = bytearray(last.read_bytes())
        place = bench.random.randrange(len(content))
        if fault.startswith("truncated"):
            del content[place:]
        else:
            content[place] ^= 1 << bench.random.randrange(8)
        last.write_bytes(content)
        (out_dir / "model.pyth").write_bytes(content)
        wrong = None
        try:
            state = read_checkpoint(out_dir / "model.pyth")
        except CheckpointError:
            bench.rejected[fault] += 1
        else:  # harmless only in a byte without content, such as tensor padding
            if not runs.same(
                {k: v for k, v in state.items() if k != "cfg"}, bench.wanted[backend][1]
            ):
                wrong = f"{fault} at {place} was not detected"
        shutil.copy(bench.whole[backend] / "model.pyth", out_dir)
        job = bench.job(out_dir, backend, 0)
        bench.count(fault, wrong or bench.resume(job, out_dir, backend))


def mismatched(bench: Bench) -> None:
    """Resume from and test checkpoints that do not fit; both must fail with one line."""
    out_dir = bench.folder / "mismatched"
    for fault, changes, edit, message in _mismatches():
        shutil.copytree(bench.whole["device"], out_dir)
        for path in (out_dir / "model.pyth", *CheckpointFolder(out_dir).files()):
            state = read_checkpoint(path)
            edit(state)
            torch.save(state, path)
        jobs = {
            "resume": bench.job(out_dir, "device", 0, **changes),
            "test": runs.testing(out_dir / "model.pyth", bench.guide, **changes),
        }
        for use, job in jobs.items():
            before = sorted(p.name for p in out_dir.rglob("*.pyth"))
            wrong = _not_one_line(bench.finish(job), message)
            if before != sorted(p.name for p in out_dir.rglob("*.pyth")):
                wrong = wrong or "files were changed"
            bench.count(f"{fault}, {use}", wrong)
        shutil.rmtree(out_dir)


def _mismatches() -> Iterator[tuple[str, dict[str, Any], Callable[[Any], object], str]]:
    """Yield fault, changed settings, a function that edits the state, and part of the message."""

    def each(change: Callable[[Any], object]) -> Callable[[Any], object]:
        return lambda state: [change(state[part]) for part in ("model_state", "ema_state")]

    classes = {"head.weight": torch.zeros(12, 24), "head.bias": torch.zeros(12)}
    extra = {"teacher.weight": torch.ones(1)}
    yield "another model", {"TRANSFORMER__HIDDEN_DIM": 32}, each(len), "is [24], the model has [32]"
    yield (
        *("another class count", {}, each(lambda weights: weights.update(classes))),
        "head.weight is [12, 24], the model has [10, 24]",
    )
    yield "a missing key", {}, each(lambda weights: weights.pop("norm.weight")), "norm.weight"
    yield "an extra key", {}, each(lambda weights: weights.update(extra)), "teacher.weight"
    yield "no weights", {}, lambda state: state.pop("model_state"), "model_state"


def _not_one_line(end: runs.End, message: str) -> str | None:
    """Describe how a run failed to stop with a one-line error; None if it did not fail."""
    errors = [line for line in end.err.splitlines() if not line.startswith("Warning: ")]
    is_one_line = len(errors) == 1 and errors[0].startswith("Error: ")
    if end.status == 1 and is_one_line and message in end.err:
        return None
    return f"exit status {end.status}, not one line with {message!r}: {end.err[-300:]}"


def removed(bench: Bench, count: int) -> None:
    """Remove OUT_DIR or the log during training."""
    for fault in ("OUT_DIR removed", "log.txt removed"):
        for _ in range(count):
            out_dir, backend, job = bench.next_run()
            child = bench.start(job)
            gone = out_dir if fault.startswith("OUT_DIR") else out_dir / "log.txt"
            assert bench.watch.wait(child, "step", bench.random.randint(1, 13))
            time.sleep(bench.random.uniform(0, bench.seconds["step"]))
            gone.rename(bench.folder / f"gone_{bench.random.random()}")
            end = child.end()
            if not (out_dir / "model.pyth").exists():  # removed with the folder, not beaten since
                shutil.copy(bench.whole[backend] / "model.pyth", out_dir)
            wrong = runs.verdict(end, out_dir, bench.wanted[backend])
            if not wrong and "Finished" not in (out_dir / "log.txt").read_text():
                wrong = "the log does not continue"
            bench.count(fault, wrong)
            shutil.rmtree(out_dir)


def second_run(bench: Bench, count: int) -> None:
    """Start a second run in the OUT_DIR of a running one."""
    for _ in range(count):
        out_dir, backend, job = bench.next_run()
        child = bench.start(job)
        assert bench.watch.wait(child, "step", bench.random.randint(1, 13))
        child.send(signal.SIGSTOP)
        end = runs.finished(job, bench.folder / "second_output")
        child.send(signal.SIGCONT)
        wrong = _not_one_line(end, "is in use by another run")
        bench.count(
            "second run in one OUT_DIR",
            wrong or runs.verdict(child.end(), out_dir, bench.wanted[backend]),
        )


def disks(bench: Bench) -> None:
    """Fill a small file system during a save, then make it read-only."""
    mount = bench.folder / "disk"
    mount.mkdir()
    size = (bench.whole["device"] / "model.pyth").stat().st_size
    for number in range(12):
        room = int(size * (0.2 + number / 3))  # a run needs room for four files of that size
        _, backend, _ = bench.next_run()
        out_dir = mount / "out"
        job = bench.job(out_dir, backend, 0)
        _shell("mount", "-t", "tmpfs", "-o", f"size={room}", "lg_faults", str(mount))
        try:
            end = bench.finish(job)
            if end.status == 0:
                break
            wrong = _not_one_line(end, "No space left on device")
            wrong = wrong or _not_whole(out_dir, end)
            _shell("mount", "-o", "remount,size=64m", str(mount))
            bench.count("disk full in a save", wrong or bench.resume(job, out_dir, backend))
            bench.finish(job)  # a finished run, for the read-only disk
            _shell("mount", "-o", "remount,ro", str(mount))
            for again in (job, bench.job(mount / "new", backend, 0)):
                wrong = _not_one_line(bench.finish(again), "Read-only file system")
                if bench.watch.counts[1]:
                    wrong = wrong or "trained before the error"
                bench.count("OUT_DIR read-only", wrong)
        finally:
            _shell("umount", str(mount))


def _not_whole(out_dir: Path, end: runs.End) -> str | None:
    """Describe the damage that a full disk caused; None if there is none."""
    if left := runs.leftovers(out_dir):
        return f"temporary files left: {', '.join(left)}"
    files = CheckpointFolder(out_dir).files()
    for path in (*files, *out_dir.glob("model.pyth")):
        read_checkpoint(path)
    if files and str(files[-1]) not in end.err:
        return f"does not name {files[-1]}: {end.err[-300:]}"
    return None


def _shell(*command: str) -> None:
    subprocess.run(command, check=True)
