#!/usr/bin/env python3
"""Test short guided runs with kills, signals, damaged files and full disks. Print a table.

    python benchmarks/faults.py [--kills 100] [--seed 1]

Each try is a separate run with one fault, followed by the same command until it finishes. A try
survives if the best and the last checkpoint are bit-identical to those of an undisturbed run and
no temporary file is left, or, if the run has to stop, if one line gives the reason and existing
files are intact. Runs alternate between DATA_LOADER.BACKEND device and workers and between 0 and 2
workers. Disk faults need root to mount a small file system in memory. The exit status is 1 if
anything was lost. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import collections
import itertools
import os
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
from benchmarks.report import make_parser, write_json  # noqa: E402

LOADERS = list(itertools.product(("device", "workers"), (0, 2)))
COUNTS = {"start-up": 1, "step": 16, "log": 60, "save": 6, "test": 8, "precompute": 1}


class Bench:
    """The table of results and everything that the tries share."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.watch = runs.Watch()
        self.rows: dict[str, dict[str, Any]] = {}
        self.died_in: collections.Counter[str] = collections.Counter()
        self.rejected: collections.Counter[str] = collections.Counter()
        self._loaders = itertools.cycle(LOADERS)
        self._number = 0
        end = self.finish(runs.guide_training(folder / "guide"))
        assert end.status == 0, end.err
        self.guide = folder / "guide/model.pyth"
        self.seconds: dict[str, float] = {}  # mean duration of each phase in undisturbed runs
        self.whole: dict[str, Path] = {}
        for backend, workers in LOADERS:
            self.whole[backend] = self.undisturbed(backend, workers)
        self.wanted = {backend: runs.result(path) for backend, path in self.whole.items()}
        bank = folder / "bank"
        assert self.finish(runs.precompute(bank, self.guide, 0)).status == 0
        self.note_seconds("precompute")
        self.bank = runs.content(bank)

    def undisturbed(self, backend: str, workers: int) -> Path:
        """Run without a fault, note how long the phases take, and return OUT_DIR."""
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
        return runs.finished(job, self.folder / "output", self.watch)

    def start(self, job: runs.Job) -> runs.Child:
        return runs.Child(job, self.folder / "output", self.watch)

    def kill(self, job: runs.Job, phase: str, nth: int, delay: float) -> str | None:
        return runs.killed(job, self.folder / "output", self.watch, (phase, nth), delay)

    def next_run(self) -> tuple[Path, str, runs.Job]:
        """Return a new folder, the next backend, and the job."""
        self._number += 1
        out_dir = self.folder / f"run_{self._number}"
        backend, workers = next(self._loaders)
        return out_dir, backend, self.job(out_dir, backend, workers)

    def count(self, fault: str, wrong: str | None) -> None:
        """Count one try; `wrong` describes what was lost."""
        row = self.rows.setdefault(fault, {"tries": 0, "survived": 0, "lost": 0, "what": []})
        row["tries"] += 1
        row["survived" if wrong is None else "lost"] += 1
        if wrong is not None:
            row["what"].append(wrong)
            print(f"LOST ({fault}): {wrong}", flush=True)

    def resume(self, job: runs.Job, out_dir: Path, backend: str) -> str | None:
        """Repeat the command and describe what is wrong with the result, if anything."""
        wrong = runs.verdict(self.finish(job), out_dir, self.wanted[backend])
        shutil.rmtree(out_dir, ignore_errors=True)
        return wrong


def kills(bench: Bench, count: int) -> None:
    """Kill runs with SIGKILL, alternating between the phases."""
    for phase in itertools.islice(itertools.cycle(runs.PHASES), count):
        died = None
        while died is None:  # a run may finish before it is killed
            delay = bench.random.uniform(0, bench.seconds[phase])
            nth = bench.random.randint(1, COUNTS[phase])
            if phase == "precompute":
                died, wrong = killed_precompute(bench, delay)
            else:
                out_dir, backend, job = bench.next_run()
                died = bench.kill(job, phase, nth, delay)
                wrong = bench.resume(job, out_dir, backend)
            if died or wrong:
                bench.count(f"kill -9, {phase}", wrong)
        bench.died_in[died] += 1


def killed_precompute(bench: Bench, delay: float) -> tuple[str | None, str | None]:
    """Kill the computation of features and repeat it; return the phase and what was lost."""
    folder = bench.folder / "killed_bank"
    job = runs.precompute(folder / "bank", bench.guide, bench.random.choice((0, 2)))
    died = bench.kill(job, "precompute", 1, delay)
    end = bench.finish(job)
    wrong = None
    if end.status != 0:
        wrong = f"exit status {end.status}: {end.err[-300:]}"
    elif runs.content(folder / "bank") != bench.bank:
        wrong = "stored features differ from the undisturbed ones"
    elif len(os.listdir(folder)) > 1:
        wrong = f"temporary files left: {', '.join(os.listdir(folder))}"
    shutil.rmtree(folder)
    return died, wrong


def signals(bench: Bench, count: int) -> None:
    """Send SIGTERM and SIGINT at random moments of training."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        done = 0
        while done < count:
            out_dir, backend, job = bench.next_run()
            child, has_begun = bench.start(job), False
            phase = bench.random.choice(("step", "log", "save", "test"))
            nth = bench.random.randint(1, COUNTS[phase])
            if bench.watch.wait(child, phase, nth):
                time.sleep(bench.random.uniform(0, bench.seconds[phase]))
                has_begun = bench.watch.counts[1] > 0  # before, there is nothing to resume
                child.send(signum)
            end = child.end()
            wrong = None
            if end.status == 0:  # the run had finished or was in its last save
                wrong = bench.resume(job, out_dir, backend)
                if wrong is None:
                    continue
            elif end.status != 128 + signum:
                wrong = f"exit status {end.status}: {end.err[-300:]}"
            elif has_begun and f"OUT_DIR {out_dir}" not in end.out:
                wrong = f"no resume command: {end.out[-300:]}"
            wrong = wrong or bench.resume(job, out_dir, backend)
            bench.count(signal.Signals(signum).name, wrong)
            done += 1


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default 100)")
    parser.add_argument("--only-kills", action="store_true", help="skip the other faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/faults.json"))
    args = parser.parse_args()
    started = time.time()
    torch.set_num_threads(1)  # forked children of a multi-threaded process would hang
    with tempfile.TemporaryDirectory(prefix="lg_faults_") as folder:
        bench = Bench(Path(folder), args.seed)
        kills(bench, args.kills)
        if not args.only_kills:
            signals(bench, max(args.kills // 5, 1))
            fault_files.damaged(bench, max(args.kills // 2, 1))
            fault_files.mismatched(bench)
            fault_files.removed(bench, max(args.kills // 10, 1))
            fault_files.second_run(bench, max(args.kills // 33, 1))
            if os.geteuid() == 0:
                fault_files.disks(bench)
            else:
                print("Skipping disk faults: they need root.")
    seconds = time.time() - started
    print(f"{'fault':<34}{'tries':>7}{'survived':>10}{'lost':>6}")
    for fault, row in bench.rows.items():
        print(f"{fault:<34}{row['tries']:>7}{row['survived']:>10}{row['lost']:>6}")
    died = ", ".join(f"{phase} {bench.died_in[phase]}" for phase in runs.PHASES)
    for fault, number in bench.rejected.items():
        print(f"{fault}: {number} of {bench.rows[fault]['tries']} rejected, the others harmless.")
    print(f"Killed runs died in: {died}. {seconds:,.0f} s, seed {args.seed}.")
    write_json(
        args.out,
        seed=args.seed,
        seconds=round(seconds),
        died_in=bench.died_in,
        rejected=bench.rejected,
        rows=bench.rows,
    )
    return int(any(row["lost"] for row in bench.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
