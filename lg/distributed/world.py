"""Processes: who am I, how many are we, what we exchange, and how all end when one does.

The world comes from torchrun's (or a cluster job's) environment, or from `lg.distributed.launch`.
The store, through which processes find each other, belongs to the launcher and so outlives them.
The first process that fails records it there, and only that process reports the error.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import socket
import struct
import sys
import time
import uuid
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

LAUNCHED = "LG_LAUNCHED"  # in the environment of processes that `lg.distributed.launch` started
_FAULT = "fault"  # key in the store


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


_store: dist.Store | None = None  # of this process, once it has joined


def join(*, backend: str, device: str = "auto") -> World:
    """Joins the process group that the environment describes; a world of one without such an
    environment.

    Args:
        backend: nccl or gloo.
        device: as in `select_device`; processes that do not use GPUs always take gloo.
    """
    global _store
    if "RANK" not in os.environ:
        return World()
    if not dist.is_initialized():
        on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if LAUNCHED in os.environ:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            _store = dist.TCPStore(*address, is_master=False)
        else:
            _end_with_parent()
            one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
            if one_machine and "TORCHELASTIC_RUN_ID" not in os.environ:
                agents = _local_store(rank)
            else:
                agents, rank, size = next(rendezvous("env://"))
            _store = dist.PrefixStore(_meeting(agents, rank, size), agents)
            if not one_machine:
                _choose_interface(os.environ["MASTER_ADDR"])
        dist.init_process_group(
            backend if on_gpu else "gloo", store=_store, rank=rank, world_size=size
        )
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return World(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def _local_store(rank: int) -> dist.TCPStore:
    """The store of processes of one machine that nobody keeps one for: the first does, and nothing
    listens on another address than loopback."""
    use_loopback(os.environ)
    address, port = "127.0.0.1", int(os.environ["MASTER_PORT"])
    if rank > 0:
        return dist.TCPStore(address, port, is_master=False)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen()
        return dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )


def use_loopback(environment: MutableMapping[str, str]) -> None:
    """Has the processes of one machine talk where no other machine can."""
    name = "lo0" if sys.platform == "darwin" else "lo"
    environment.update(GLOO_SOCKET_IFNAME=name, NCCL_SOCKET_IFNAME=name)


def _meeting(store: dist.Store, rank: int, size: int) -> str:
    """A name that the processes of this start share, and none that were here before.

    After a restart torchrun's store may still hold what the last processes said of themselves, and
    its restart counts differ between machines. So each process says a new word; the first lists the
    words until all have found their own in the list.
    """
    word = uuid.uuid4().hex[:16]
    store.set(f"word/{rank}", word)
    others = range(1, size)
    while True:
        if rank == 0:
            store.set("words", " ".join(store.get(f"word/{r}").decode() for r in range(size)))
        words = store.get("words").decode()
        name = hashlib.sha256(words.encode()).hexdigest()
        if rank == 0 and all(store.check([f"{name}/{r}"]) for r in others):
            store.set(f"{name}/complete", "")
        elif rank > 0 and word in words.split():
            store.set(f"{name}/{rank}", "")
        if word in words.split() and store.check([f"{name}/complete"]):
            return name
        time.sleep(0.02)


def _choose_interface(address: str) -> None:
    """Has gloo use the network on which the other machines are, unless it is told which; by itself
    it takes the one that this machine's name stands for, which often is loopback."""
    if "GLOO_SOCKET_IFNAME" in os.environ or not sys.platform.startswith("linux"):
        return
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((address, 1))  # sends nothing; chooses the way there
        mine = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                if fcntl.ioctl(probe, get_address, request)[20:24] == mine:
                    os.environ["GLOO_SOCKET_IFNAME"] = name


def _end_with_parent() -> None:
    """Asks Linux for a SIGTERM when who started this process is gone; others would train on."""
    set_parent_death_signal = 1  # a number of prctl's
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(set_parent_death_signal, signal.SIGTERM)


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def speaks_for_all(*, lost_peer: bool = False) -> bool:
    """Whether this process is the one that says why the run ends: the first with a fault, which
    notes it before it ends and the others lose contact with it.

    Args:
        lost_peer: the fault is that another process is gone; who started the processes, if that
            was `launch`, knows more about it than we do.
    """
    if _store is None:
        return True
    if lost_peer and LAUNCHED in os.environ:
        return False
    return claim_fault(_store)


def claim_fault(store: dist.Store) -> bool:
    """Whether no process has noted a fault before; from now on one has."""
    try:
        return bool(store.add(_FAULT, 1) == 1)
    except RuntimeError:  # who kept the store is gone, and nobody else can ask it either
        return True


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def smallest(value: int, device: torch.device) -> int:
    """The smallest of the values of all processes."""
    if not dist.is_initialized():
        return value
    least = torch.tensor(value, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least.item())


def rows_of_all(rows: Tensor) -> list[Tensor]:
    """The tensors of all processes, of one shape, in rank order."""
    if not dist.is_initialized():
        return [rows]
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows)
    return gathered


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


@contextlib.contextmanager
def in_turn(world: World) -> Iterator[None]:
    """Work that may fetch files: the main process does it before all others, then the first process
    of each other machine, then the rest, so that each file is fetched once and never by two."""
    turn = 0 if world.is_main else 1 if world.local_rank == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()
