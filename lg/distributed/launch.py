"""Starting one process a GPU on this machine, and ending all of them when one ends."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from lg.distributed import LAUNCHED, claim_fault, use_loopback

GRACE = 10  # seconds that processes have to end by themselves when one has failed


def launch(
    entry: Callable[..., None],
    args: tuple[Any, ...],
    *,
    num_processes: int,
    host: str,
    port_range: tuple[int, int],
) -> None:
    """Runs `entry(*args)` in `num_processes` processes, or right here when there is one or torchrun
    started us.

    They meet at `host`, and nothing listens on any other address. When one ends with a fault, the
    others have `GRACE` seconds to end too, and are stopped then.
    """
    if num_processes == 1 or "RANK" in os.environ:
        entry(*args)
        return
    with _listen(host, port_range) as listening:
        address, port = listening.getsockname()[:2]
        store = dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        environment = {LAUNCHED: "1", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        if host in ("localhost", "127.0.0.1"):
            use_loopback(environment)
        context = mp.start_processes(
            _child,
            (entry, args, num_processes, environment),
            nprocs=num_processes,
            start_method="spawn",
            join=False,
        )
        _wait(context, store)


def _wait(context: Any, store: dist.Store) -> None:
    """Waits for all processes; what this one is asked to end with, they are asked as well."""

    def forward(signum: int, frame: FrameType | None) -> None:
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, signum)

    kept = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not context.join(grace_period=GRACE):
            pass
    except mp.ProcessExitedException as error:
        if error.signal_name and claim_fault(store):
            print(_killed(error.error_index, error.signal_name), file=sys.stderr)
        # A process that said itself why it ended has a status of its own.
        sys.exit(error.exit_code if error.exit_code > 0 else 128 - error.exit_code)
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)


def _killed(rank: int, signal_name: str) -> str:
    cause = " Often that means that memory ran out." if signal_name == "SIGKILL" else ""
    return (
        f"Error: process {rank} was ended by {signal_name}, so all processes were stopped.{cause} "
        "The same command goes on from the last checkpoint."
    )


def _child(
    rank: int,
    entry: Callable[..., None],
    args: tuple[Any, ...],
    size: int,
    environment: dict[str, str],
) -> None:
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
    )
    entry(*args)


@contextlib.contextmanager
def _listen(host: str, port_range: tuple[int, int]) -> Iterator[socket.socket]:
    """A socket that listens at a free port of the range, drawn without touching the run's random
    streams."""
    first, last = port_range
    count = last - first + 1
    for port in random.SystemRandom().sample(range(first, last + 1), min(100, count)):
        with socket.socket() as listening:
            try:
                listening.bind((host, port))
            except OSError:
                continue
            listening.listen()
            yield listening
            return
    raise OSError(f"PORT_RANGE is {list(port_range)}; no free port was found in it at {host}.")
