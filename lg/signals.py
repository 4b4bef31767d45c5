"""Stopping in good order: Ctrl-C and SIGTERM let the step end, save, and say how to go on."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator

from lg import distributed
from lg.distributed.cluster import cluster_signals
from lg.run import Run

_SAME = 1.0  # seconds within which signals are one request


class Interrupted(Exception):
    """Training was stopped by a signal, after saving; `code` is the exit status of such an end."""

    def __init__(self, signum: int, path: str) -> None:
        super().__init__(f"Stopped by {signal.Signals(signum).name}. Saved {path}.")
        self.code = 128 + signum


@contextlib.contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """SIGINT, SIGTERM and a cluster's warning ask for a stop after the current step; one more ends
    at once.

    What comes within a second is the same request: a terminal signals all processes, and those
    that started others pass it on.
    """
    first = 0.0

    def ask(signum: int, frame: object) -> None:
        nonlocal first
        if run.signals and time.monotonic() - first > _SAME:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if run.signals:
            return
        first = time.monotonic()
        run.signals.append(signum)
        if run.world.is_main:
            name = signal.Signals(signum).name
            print(f"\n{name}: saving after this step; once more to stop at once.", file=sys.stderr)

    kept = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM, *cluster_signals())}
    try:
        yield
    except Interrupted as stop:
        run.log.close_bar()
        run.log.info(f"{stop} To go on: {_same_command()}")
        raise
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)


def asked_to_stop(run: Run, total_step: int | None) -> bool:
    """Whether a signal came to any process. GPUs are asked at log points and between epochs only,
    because the question has them wait."""
    if run.world.size == 1:
        return bool(run.signals)
    between = total_step is not None and (total_step + 1) % run.settings.log_period
    if between and run.device.type == "cuda":
        return False
    stop = distributed.any_process(bool(run.signals), run.device)
    if stop and not run.signals:
        run.signals.append(signal.SIGTERM)
    return stop


def _same_command() -> str:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "give the same torchrun command again"
    if "SUBMITIT_EXECUTOR" in os.environ:
        return "submit it again; a job that is preempted is put back into the queue by itself"
    return shlex.join([os.path.basename(sys.executable), *sys.argv])
