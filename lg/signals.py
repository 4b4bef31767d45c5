"""Stopping in good order: Ctrl-C and SIGTERM let the step end, save, and say how to go on."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator

from lg import distributed
from lg.run import Run


class Interrupted(Exception):
    """Training was stopped by a signal, after saving; `code` is the exit status of such an end."""

    def __init__(self, signum: int, path: str) -> None:
        super().__init__(f"Stopped by {signal.Signals(signum).name}. Saved {path}.")
        self.code = 128 + signum


@contextlib.contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a stop after the current step; a second one ends at once."""

    def ask(signum: int, frame: object) -> None:
        if run.signals:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        run.signals.append(signum)
        name = signal.Signals(signum).name
        print(f"\n{name}: saving after this step; once more to stop at once.", file=sys.stderr)

    kept = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Interrupted as stop:
        run.log.end_bar()
        command = shlex.join([os.path.basename(sys.executable), *sys.argv])
        run.log.say(f"{stop} To go on: {command}")
        raise
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)


def asked_to_stop(run: Run, total_step: int | None) -> bool:
    """Whether a signal came. Several processes ask each other at log points and between epochs
    only."""
    if run.world.size == 1:
        return bool(run.signals)
    if total_step is not None and (total_step + 1) % run.settings.log_period:
        return False
    stop = distributed.any_process(bool(run.signals), run.device)
    if stop and not run.signals:
        run.signals.append(signal.SIGTERM)
    return stop
