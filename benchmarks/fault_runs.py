"""Short guided runs that benchmarks/faults.py observes and kills.

Each run executes a script's `main` in a forked child of a process that has already imported
everything, so a run takes about a second. Shared memory tells the parent the child's phase.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sklearn.datasets  # noqa: E402, F401  # slow to import, so import it before forking
import torch  # noqa: E402

import lg  # noqa: E402
import lg.logs.tensorboard  # noqa: E402, F401
import precompute_feature  # noqa: E402
import run_net  # noqa: E402
from lg import checkpoint, trainer  # noqa: E402
from lg.checkpoint import CheckpointFolder, read_checkpoint  # noqa: E402
from lg.guidance import precompute as precomputing  # noqa: E402
from lg.logs.log import RunLog  # noqa: E402

PHASES = ("start-up", "step", "log", "save", "test", "precompute")
EPOCHS = 4
TINY = {
    "DEVICE": "cpu",
    "TRANSFORMER.HIDDEN_DIM": 24,
    "TRANSFORMER.DEPTH": 2,
    "TRANSFORMER.NUM_HEADS": 2,
    "TRANSFORMER.DROP_RATE": 0.1,
    "OPTIM.MAX_EPOCH": EPOCHS,
    "OPTIM.BASE_LR": 0.01,
    "OPTIM.WARMUP_EPOCHS": 1,
    "OPTIM.EMA_UPDATE_PERIOD": 1,
    "OPTIM.EMA_ALPHA": 0.01,
    "TRAIN.FRACTION": 0.1,
    "TRAIN.BATCH_SIZE": 30,
    "TRAIN.STRONG_AUGMENTATION": True,
    "TRAIN.MIXUP_ALPHA": 0.4,
    "TEST.PERIOD": 1,
    "LOG_PERIOD": 1,
    "DISTILLATION.INTER_STUDENT_INDEX": [0, 1],
    "DISTILLATION.INTER_TEACHER_INDEX": [0, 2],
}


class Job(NamedTuple):
    """A command: a script's `main` and its arguments."""

    main: Callable[[], None]
    argv: list[str]


class End(NamedTuple):
    """How a run ended: its exit status as a shell reports it, and its output."""

    status: int
    out: str
    err: str


def arguments(changes: dict[str, Any]) -> list[str]:
    """Return settings as KEY VALUE arguments."""
    return [text for key, value in changes.items() for text in (key, str(value))]


def training(out_dir: Path, guide: Path, **changes: Any) -> Job:
    """Return the job of a guided run; keys of `changes` have __ in place of dots."""
    values = {**TINY, "OUT_DIR": out_dir, "DISTILLATION.TEACHER_WEIGHTS": guide}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    config = str(ROOT / "configs/digits/vit_digits_ours.yaml")
    argv = ["run_net.py", "--mode", "train", "--cfg", config, *arguments(values)]
    return Job(run_net.main, argv)


def testing(weights: Path, guide: Path, **changes: Any) -> Job:
    """Return the job that tests a weights file."""
    job = training(weights.parent / "test", guide, TEST__WEIGHTS=weights, **changes)
    return Job(job.main, [*job.argv[:2], "test", *job.argv[3:]])


def guide_training(out_dir: Path) -> Job:
    """Return the job that trains the guide for a few epochs."""
    config = str(ROOT / "configs/digits/r-8_digits.yaml")
    values = {"DEVICE": "cpu", "OUT_DIR": out_dir, "OPTIM.MAX_EPOCH": 3, "TRAIN.FRACTION": 0.1}
    values |= {"OPTIM.WARMUP_EPOCHS": 1, "TRAIN.BATCH_SIZE": 30, "DATA_LOADER.NUM_WORKERS": 0}
    argv = ["run_net.py", "--mode", "train", "--cfg", config, *arguments(values)]
    return Job(run_net.main, argv)


def precompute(bank: Path, guide: Path, workers: int) -> Job:
    """Return the job that stores the guide's maps of 300 images, in small batches."""
    config = str(ROOT / "configs/digits/vit_digits_ours_offline.yaml")
    values = {"DEVICE": "cpu", "DISTILLATION.TEACHER_WEIGHTS": guide, "TEST.BATCH_SIZE": 10}
    values |= {"DATA_LOADER.NUM_WORKERS": workers}
    argv = ["precompute_feature.py", "--cfg", config, "--out", str(bank), "--shifts", "3"]
    return Job(precompute_feature.main, [*argv, *arguments(values)])


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Watch:
    """The phase of a run and how often each phase began, in memory shared with the child."""

    def __init__(self) -> None:
        self.phase = multiprocessing.RawValue(ctypes.c_int, 0)
        self.counts = multiprocessing.RawArray(ctypes.c_long, len(PHASES))
        self.seconds = multiprocessing.RawArray(ctypes.c_double, len(PHASES))
        self._aim = multiprocessing.RawArray(ctypes.c_long, 2)  # a phase and its n-th start
        self.is_aimed = multiprocessing.RawValue(ctypes.c_bool, False)

    def clear(self, phase: str = "start-up", count: int = 1) -> None:
        """Reset for a run that pauses briefly when `phase` begins for the `count`-th time."""
        self.phase.value, self.is_aimed.value = 0, False
        self._aim[:] = PHASES.index(phase), count
        self.counts[:] = self.seconds[:] = [0] * len(PHASES)
        self.counts[0] = 1  # a run begins with start-up

    def inside(self, owner: Any, name: str, phase: str) -> None:
        """Wrap a function so that the phase is `phase` while it runs."""
        function, number = getattr(owner, name), PHASES.index(phase)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before, started = self.phase.value, time.perf_counter()
            self.phase.value = number
            self.counts[number] += 1
            if [number, self.counts[number]] == self._aim[:]:
                while not self.is_aimed.value and time.perf_counter() < started + 0.1:
                    pass  # some phases are shorter than the time it takes to notice their start
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[number] += time.perf_counter() - started
                self.phase.value = before

        setattr(owner, name, watched)

    def wrap(self) -> None:
        """Wrap the functions of each phase; called in the child."""
        started, step = time.perf_counter(), trainer.train_epoch

        def train_epoch(run: Any) -> None:
            if not self.counts[1]:
                self.seconds[0] = time.perf_counter() - started
            self.phase.value = 1  # from here on, code outside the other phases counts as step
            step(run)

        trainer.train_epoch = train_epoch
        self.inside(trainer, "train_step", "step")
        for name in ("stats", "scalars", "info"):
            self.inside(RunLog, name, "log")
        self.inside(checkpoint, "write_atomically", "save")
        self.inside(trainer, "evaluate", "test")
        self.inside(precomputing, "precompute", "precompute")

    def wait(self, child: Child, phase: str, count: int) -> bool:
        """Wait until a phase has begun `count` times; return False if the run ends first."""
        number = PHASES.index(phase)
        while self.counts[number] < count:
            if child.has_ended():
                return False
        return True


class Child:
    """A running job."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        watch: Watch | None = None,
        aim: tuple[str, int] = ("start-up", 1),
    ) -> None:
        """Start the job and write its output to files in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        if watch is not None:
            watch.clear(*aim)
        self._output = folder / "out.txt", folder / "err.txt"
        self._process = multiprocessing.get_context("fork").Process(
            target=_run, args=(job, self._output, watch)
        )
        self._process.start()

    def has_ended(self) -> bool:
        return not self._process.is_alive()

    def send(self, signum: int) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, signum)

    def end(self) -> End:
        """Wait for the job to end and return its status and output."""
        self._process.join()
        status = self._process.exitcode
        out, err = (path.read_text(errors="replace") for path in self._output)
        return End(status if status >= 0 else 128 - status, out, err)


def _run(job: Job, output: tuple[Path, Path], watch: Watch | None) -> None:
    """Run the job in the child."""
    for number, path in enumerate(output, start=1):
        with open(path, "wb") as stream:
            os.dup2(stream.fileno(), number)
    precomputing._SAVE_PERIOD = 0.01  # so that a restart finds something to resume
    if watch is not None:
        watch.wrap()
    sys.argv = job.argv
    job.main()


def finished(job: Job, folder: Path, watch: Watch | None = None) -> End:
    """Run a job to its end."""
    return Child(job, folder, watch).end()


def killed(job: Job, folder: Path, watch: Watch, aim: tuple[str, int], delay: float) -> str | None:
    """Start a run and kill it with SIGKILL.

    Args:
        job: The run.
        folder: Folder for its output.
        watch: Observes its phases.
        aim: A phase and the number of its start.
        delay: Seconds from that start to the kill.

    Returns:
        The phase in which the run died; None if it finished first.
    """
    child = Child(job, folder, watch, aim)
    if watch.wait(child, *aim):
        until = time.perf_counter() + delay
        watch.is_aimed.value = True
        while time.perf_counter() < until:
            pass
        child.send(signal.SIGKILL)
    end = child.end()
    if end.status == 128 + signal.SIGKILL:
        return PHASES[watch.phase.value]
    assert end.status == 0, end.err
    return None


def result(out_dir: Path) -> list[dict[str, Any]]:
    """Read the best and the last checkpoint of a run, without the config that names its folder."""
    paths = (out_dir / "model.pyth", CheckpointFolder(out_dir).files()[-1])
    return [{k: v for k, v in read_checkpoint(path).items() if k != "cfg"} for path in paths]


def same(left: Any, right: Any) -> bool:
    """Return whether two nested dicts and lists of tensors are bit-identical."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return [*left] == [*right] and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right and type(left) is type(right)


def leftovers(folder: Path) -> list[str]:
    """List temporary files."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*.partial*")]


def verdict(end: End, out_dir: Path, wanted: list[dict[str, Any]]) -> str | None:
    """Describe how a finished run differs from an undisturbed one; None if it does not."""
    if end.status != 0:
        return f"exit status {end.status}: {end.err[-300:]}"
    if left := leftovers(out_dir):
        return f"temporary files left: {', '.join(left)}"
    return None if same(result(out_dir), wanted) else "weights differ from the undisturbed run"
