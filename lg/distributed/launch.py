"""Start one process per GPU on this machine, and end all of them when one fails."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from lg.distributed import LAUNCHED, claim_failure, serve_store, use_loopback

GRACE = 10  # seconds that the other processes get to end when one has failed


def launch(
    entry: Callable[[], None],
    *,
    num_processes: int,
    host: str,
    port_range: tuple[int, int],
) -> None:
    """Run `entry()` in `num_processes` processes.

    One process, or a process that torchrun started, calls it directly. When one process fails, the
    others are stopped after `GRACE` seconds.

    Args:
        entry: A function that can be pickled.
        num_processes: At least 1.
        host: The one address that the shared store listens at.
        port_range: First and last port to try.

    Raises:
        OSError: No port of the range is free.
    """
    if num_processes == 1 or "RANK" in os.environ:
        entry()
        return
    store = _serve_at_free_port(host, port_range)
    environment = {LAUNCHED: "1", "MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)}
    environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
    if host in ("localhost", "127.0.0.1"):
        use_loopback(environment)
    context = mp.start_processes(
        _run_process,
        (entry, environment),
        nprocs=num_processes,
        start_method="spawn",
        join=False,
    )
    _wait(context, store)


def _serve_at_free_port(host: str, port_range: tuple[int, int]) -> dist.TCPStore:
    first, last = port_range
    # SystemRandom, because the run's random streams must not change.
    for port in random.SystemRandom().sample(range(first, last + 1), min(100, last - first + 1)):
        try:
            return serve_store(host, port)
        except OSError:
            continue
    raise OSError(f"PORT_RANGE is {list(port_range)}; no free port was found in it at {host}.")


def _wait(context: Any, store: dist.Store) -> None:
    """Wait for all processes; pass SIGINT and SIGTERM on to them."""

    def forward(signum: int, frame: FrameType | None) -> None:
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, signum)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not context.join(grace_period=GRACE):
            pass
    except mp.ProcessExitedException as error:
        if error.signal_name and claim_failure(store):
            print(_describe_kill(error.error_index, error.signal_name), file=sys.stderr)
        sys.exit(error.exit_code if error.exit_code > 0 else 128 - error.exit_code)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _describe_kill(rank: int, signal_name: str) -> str:
    cause = " (often because memory ran out)" if signal_name == "SIGKILL" else ""
    return (
        f"Error: process {rank} was killed by {signal_name}{cause}, so all processes were stopped. "
        "Run the same command to resume from the last checkpoint."
    )


def _run_process(rank: int, entry: Callable[[], None], environment: dict[str, str]) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    entry()
