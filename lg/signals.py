"""Graceful stop: after Ctrl-C or SIGTERM, finish the step, save, and print how to resume."""

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

_SAME_REQUEST = 1.0  # seconds; signals within this time count as one


class Interrupted(Exception):
    """Training was saved and stopped because of a signal; `code` is the exit status."""

    def __init__(self, signum: int, path: str) -> None:
        super().__init__(f"Stopped by {signal.Signals(signum).name}. Saved {path}.")
        self.code = 128 + signum


@contextlib.contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """Record SIGINT, SIGTERM and a cluster's warning in `run.signals`; a second one stops at once.

    Signals within a second count as one request: a terminal signals all processes, and a launcher
    passes the signal on as well.
    """
    first = 0.0

    def request_stop(signum: int, frame: object) -> None:
        nonlocal first
        if run.signals and time.monotonic() - first > _SAME_REQUEST:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if run.signals:
            return
        first = time.monotonic()
        run.signals.append(signum)
        if run.world.is_main:
            name = signal.Signals(signum).name
            print(f"\n{name}: saving after this step; repeat to stop at once.", file=sys.stderr)

    previous = {
        s: signal.signal(s, request_stop)
        for s in (signal.SIGINT, signal.SIGTERM, *cluster_signals())
    }
    try:
        yield
    except Interrupted as stop:
        run.log.close_bar()
        run.log.info(f"{stop} To resume: {_resume_command()}")
        raise
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def asked_to_stop(run: Run, total_step: int | None) -> bool:
    """Return whether any process received a stop signal.

    With several processes on GPUs, this is checked at log points and between epochs only, because
    it synchronises them.

    Args:
        run: The run.
        total_step: The step that is done, counted from 0; None between epochs.
    """
    if run.world.size == 1:
        return bool(run.signals)
    between = total_step is not None and (total_step + 1) % run.settings.log_period
    if between and run.device.type == "cuda":
        return False
    stop = distributed.any_process(bool(run.signals), run.device)
    if stop and not run.signals:
        run.signals.append(signal.SIGTERM)
    return stop


def _resume_command() -> str:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "repeat the same torchrun command"
    if "SUBMITIT_EXECUTOR" in os.environ:
        return "submit it again; preempted jobs are requeued automatically"
    return shlex.join([os.path.basename(sys.executable), *sys.argv])
