#!/usr/bin/env python3
"""What a short guided run survives: kills, signals, damaged files, full disks. Prints a table.

    python benchmarks/faults.py [--kills 100] [--seed 1]

Each try is a run of its own with one fault in it, then the same command again until it ends.
Survived: the best and the last checkpoint are those of a run that nothing disturbed, to the bit,
and no temporary file stays; or, where a run must end, one line says why and what was there is
whole. Runs are read by the loader in turn: DATA_LOADER.BACKEND device and workers, with no and
two processes. Faults of disks need root, for a small file system in memory. Exit status 1 if
anything was lost. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import fault_files  # noqa: E402
from benchmarks import fault_runs as runs  # noqa: E402

LOADERS = list(itertools.product(("device", "workers"), (0, 2)))
COUNTS = {"start-up": 1, "step": 32, "log": 60, "save": 6, "test": 8, "precompute": 1}


class Bench:
    """The table, and what all tries share."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.watch = runs.Watch()
        self.rows: dict[str, dict[str, Any]] = {}
        self.died_in: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self._loaders = itertools.cycle(LOADERS)
        self._number = 0
        end = self.finish(runs.guide_training(folder / "guide"))
        assert end.status == 0, end.err
        self.guide = folder / "guide/model.pyth"
        self.seconds: dict[str, float] = {}  # that a phase takes, in runs that nothing disturbs
        self.whole: dict[str, Path] = {}
        for backend, workers in LOADERS:
            self.whole[backend] = self.undisturbed(backend, workers)
        self.wanted = {backend: runs.result(path) for backend, path in self.whole.items()}
        bank = folder / "bank/whole.npz"
        assert self.finish(runs.precompute(bank, self.guide, 0)).status == 0
        self.note_seconds("precompute")
        self.bank = bank.read_bytes()

    def undisturbed(self, backend: str, workers: int) -> Path:
        out_dir = self.folder / f"{backend}_{workers}"
        end = self.finish(self.job(out_dir, backend, workers))
        assert end.status == 0, end.err
        for phase in runs.PHASES[:-1]:
            self.note_seconds(phase)
        return out_dir

    def note_seconds(self, phase: str) -> None:
        number = runs.PHASES.index(phase)
        mean = self.watch.seconds[number] / max(self.watch.counts[number], 1)
        self.seconds[phase] = max(mean, self.seconds.get(phase, 0.0))

    def job(self, out_dir: Path, backend: str, workers: int, **changes: Any) -> runs.Job:
        loader = {"DATA_LOADER__BACKEND": backend, "DATA_LOADER__NUM_WORKERS": workers}
        return runs.training(out_dir, self.guide, **loader, **changes)

    def finish(self, job: runs.Job) -> runs.End:
        return runs.finished(job, self.folder / "says", self.watch)

    def start(self, job: runs.Job) -> runs.Child:
        return runs.Child(job, self.folder / "says", self.watch)

    def kill(self, job: runs.Job, phase: str, nth: int, delay: float) -> str | None:
        return runs.killed(job, self.folder / "says", self.watch, (phase, nth), delay)

    def next_run(self) -> tuple[Path, str, runs.Job]:
        """A new folder, the backend whose turn it is, and its command."""
        self._number += 1
        out_dir = self.folder / f"run_{self._number}"
        backend, workers = next(self._loaders)
        return out_dir, backend, self.job(out_dir, backend, workers)

    def count(self, fault: str, wrong: str | None) -> None:
        """One try more; `wrong` says what was lost."""
        row = self.rows.setdefault(fault, {"tries": 0, "survived": 0, "lost": 0, "what": []})
        row["tries"] += 1
        row["survived" if wrong is None else "lost"] += 1
        if wrong is not None:
            row["what"].append(wrong)
            print(f"LOST ({fault}): {wrong}", flush=True)

    def go_on(self, job: runs.Job, out_dir: Path, backend: str) -> str | None:
        """The same command again; what is wrong with how it ends."""
        wrong = runs.verdict(self.finish(job), out_dir, self.wanted[backend])
        shutil.rmtree(out_dir, ignore_errors=True)
        return wrong


def kills(bench: Bench, count: int) -> None:
    """kill -9 in each phase in turn."""
    for phase in itertools.islice(itertools.cycle(runs.PHASES), count):
        died = None
        while died is None:  # a run may end before it is hit
            time_in = bench.random.uniform(0, bench.seconds[phase])
            nth = bench.random.randint(1, COUNTS[phase])
            if phase == "precompute":
                died, wrong = killed_precompute(bench, time_in)
            else:
                out_dir, backend, job = bench.next_run()
                died = bench.kill(job, phase, nth, time_in)
                wrong = bench.go_on(job, out_dir, backend)
            if died or wrong:
                bench.count(f"kill -9, {phase}", wrong)
        bench.died_in[died] += 1


def killed_precompute(bench: Bench, time_in: float) -> tuple[str | None, str | None]:
    folder = bench.folder / "killed_bank"
    job = runs.precompute(folder / "bank.npz", bench.guide, bench.random.choice((0, 2)))
    died = bench.kill(job, "precompute", 1, time_in)
    end = bench.finish(job)
    wrong = None
    if end.status != 0:
        wrong = f"exit status {end.status}: {end.err[-300:]}"
    elif (folder / "bank.npz").read_bytes() != bench.bank:
        wrong = "another bank than the undisturbed one"
    elif len(os.listdir(folder)) > 1:
        wrong = f"left {', '.join(os.listdir(folder))}"
    shutil.rmtree(folder)
    return died, wrong


def signals(bench: Bench, count: int) -> None:
    """SIGTERM and SIGINT at random moments of training."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        done = 0
        while done < count:
            out_dir, backend, job = bench.next_run()
            child, has_begun = bench.start(job), False
            phase = bench.random.choice(("step", "log", "save", "test"))
            nth = bench.random.randint(1, COUNTS[phase])
            if bench.watch.wait(child, phase, nth):
                time.sleep(bench.random.uniform(0, bench.seconds[phase]))
                has_begun = bench.watch.counts[1] > 0  # before, there is nothing to save
                child.send(signum)
            end = child.end()
            wrong = None
            if end.status == 0:  # it had ended, or was in its last save
                wrong = bench.go_on(job, out_dir, backend)
                if wrong is None:
                    continue
            elif end.status != 128 + signum:
                wrong = f"exit status {end.status}: {end.err[-300:]}"
            elif has_begun and not ("To go on: python" in end.out and str(out_dir) in end.out):
                wrong = f"no resume command: {end.out[-300:]}"
            wrong = wrong or bench.go_on(job, out_dir, backend)
            bench.count(signal.Signals(signum).name, wrong)
            done += 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only-kills", action="store_true", help="leave out the other faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/faults.json"))
    args = parser.parse_args()
    started = time.time()
    torch.set_num_threads(1)  # children of a process with more threads would hang
    with tempfile.TemporaryDirectory(prefix="lg_faults_") as folder:
        bench = Bench(Path(folder), args.seed)
        kills(bench, args.kills)
        if not args.only_kills:
            signals(bench, max(args.kills // 5, 1))
            fault_files.damaged(bench, max(args.kills // 2, 1))
            fault_files.strange(bench)
            fault_files.removed(bench, max(args.kills // 10, 1))
            fault_files.second_run(bench, max(args.kills // 33, 1))
            if os.geteuid() == 0:
                fault_files.disks(bench)
            else:
                print("Faults of disks are left out: they need root.")
    seconds = time.time() - started
    print(f"{'fault':<34}{'tries':>7}{'survived':>10}{'lost':>6}")
    for fault, row in bench.rows.items():
        print(f"{fault:<34}{row['tries']:>7}{row['survived']:>10}{row['lost']:>6}")
    died = ", ".join(f"{phase} {bench.died_in[phase]}" for phase in runs.PHASES)
    for fault, number in bench.refused.items():
        print(f"{fault}: {number} of {bench.rows[fault]['tries']} refused, the others harmless.")
    print(f"Killed runs died in: {died}. {seconds:,.0f} s, seed {args.seed}.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"torch": torch.__version__, "python": platform.python_version(), "seed": args.seed}
    facts |= {
        "seconds": round(seconds),
        "died_in": dict(bench.died_in),
        "refused": dict(bench.refused),
        "rows": bench.rows,
    }
    args.out.write_text(json.dumps(facts, indent=1))
    return int(any(row["lost"] for row in bench.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
