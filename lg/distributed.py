"""Processes: who am I, how many are we, and sums over all of us.

The world comes from torchrun's environment if it is there; else `launch` starts one process a GPU
on this machine.
"""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class World(NamedTuple):
    """This process among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        """The one process that writes, logs and downloads."""
        return self.rank == 0


def launch(
    entry: Callable[..., None],
    args: tuple[Any, ...],
    *,
    num_processes: int,
    host: str,
    port_range: tuple[int, int],
) -> None:
    """Runs `entry(*args)` in `num_processes` processes, or right here when there is one or torchrun
    started us."""
    if num_processes == 1 or "RANK" in os.environ:
        entry(*args)
        return
    environment = {"MASTER_ADDR": host, "MASTER_PORT": str(_free_port(host, port_range))}
    try:
        mp.start_processes(
            _child,
            (entry, args, num_processes, environment),
            nprocs=num_processes,
            start_method="spawn",
        )
    except mp.ProcessExitedException as error:  # it has said why itself
        sys.exit(error.exit_code)


def join(*, backend: str, device: str = "auto") -> World:
    """Joins the process group that the environment describes; a world of one without such an
    environment.

    Args:
        backend: nccl or gloo.
        device: as in `select_device`; processes that do not use GPUs always take gloo.
    """
    if "RANK" not in os.environ:
        return World()
    if not dist.is_initialized():
        on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
        dist.init_process_group(backend if on_gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return World(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Gives every process the main process's buffers, such as BatchNorm statistics."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in rank order; the main process alone gets them, others an empty
    list."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(value, gathered if dist.get_rank() == 0 else None)
    return gathered if dist.get_rank() == 0 else []


def any_process(flag: bool, device: torch.device) -> bool:
    """True on all processes when it is on one."""
    if not dist.is_initialized():
        return flag
    total = torch.tensor([float(flag)], device=device)
    return bool(sum_over_processes(total).item())


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def _child(
    rank: int,
    entry: Callable[..., None],
    args: tuple[Any, ...],
    size: int,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    try:
        entry(*args)
    finally:
        leave()


def _free_port(host: str, port_range: tuple[int, int]) -> int:
    """A port of the range that nothing listens on, drawn without touching the run's random
    streams."""
    for port in random.SystemRandom().sample(
        range(port_range[0], port_range[1] + 1), min(100, port_range[1] - port_range[0] + 1)
    ):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"PORT_RANGE is {list(port_range)}; no free port was found in it.")
