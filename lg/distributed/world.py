"""The processes of a run: who this one is, what they exchange, and how all of them end together.

The environment that describes them comes from torchrun, a cluster job or `lg.distributed.launch`.
The first process that fails records this in the store that they share, and reports the error alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterator, MutableMapping
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

LAUNCHED = "LG_LAUNCHED"  # set in the environment of processes that `lg.distributed.launch` starts
_FAILURES = "failures"  # key in the store
# How long processes wait for each other. On the host they wait while the main process downloads,
# reads images or saves; a lost process is noticed at once, whatever the limit. NCCL notices it by
# its limit only, and waits no longer than compilation takes in the slowest process.
HOST_TIMEOUT, NCCL_TIMEOUT = timedelta(hours=6), timedelta(minutes=30)

_Value = TypeVar("_Value")


class World(NamedTuple):
    """The place of this process among all processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, logs and downloads."""
        return self.rank == 0


_store: dist.Store | None = None  # set once this process has joined
_host: dist.ProcessGroup | None = None  # gloo, besides NCCL; None: the default group is gloo


def join(*, backend: str, device: str = "auto") -> World:
    """Join the process group that the environment describes.

    Without such an environment the world has one process and there is no group.

    Args:
        backend: nccl or gloo.
        device: As in `select_device`; processes that do not use GPUs always use gloo.
    """
    global _store, _host
    if "RANK" not in os.environ:
        return World()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if not dist.is_initialized():
        on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
        by_nccl = on_gpu and backend == "nccl"
        _store = _connect(rank, size)
        # A process without a GPU of its own is rejected when its device is selected.
        has_own = by_nccl and local_rank < torch.cuda.device_count()
        dist.init_process_group(
            "nccl" if by_nccl else "gloo",
            store=_store,
            rank=rank,
            world_size=size,
            timeout=NCCL_TIMEOUT if by_nccl else HOST_TIMEOUT,
            device_id=torch.device("cuda", local_rank) if has_own else None,
        )
        if by_nccl:
            _host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)  # type: ignore[assignment]
    return World(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def _connect(rank: int, size: int) -> dist.Store:
    """Return the store in which the processes of this start find each other."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if LAUNCHED in os.environ:
        return dist.TCPStore(address, port, is_master=False)
    _end_with_parent()
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        _choose_interface(address)
    elif not by_torchrun:  # a cluster job on one machine
        use_loopback(os.environ)
        if rank == 0:
            return serve_store("127.0.0.1", port)
        return dist.TCPStore("127.0.0.1", port, is_master=False)
    store, _, _ = next(rendezvous("env://"))
    return dist.PrefixStore(_name_start(store, rank, size), store) if by_torchrun else store


def serve_store(host: str, port: int) -> dist.TCPStore:
    """Return a store that listens at one address; TCPStore alone would listen at all of them.

    Raises:
        OSError: The port is in use.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
        address, port = listener.getsockname()[:2]
        return dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def use_loopback(environment: MutableMapping[str, str]) -> None:
    """Set the loopback interface for traffic between processes of one machine."""
    name = "lo0" if sys.platform == "darwin" else "lo"
    environment.update(GLOO_SOCKET_IFNAME=name, NCCL_SOCKET_IFNAME=name)


def _name_start(store: dist.Store, rank: int, size: int) -> str:
    """Return a key prefix that all processes of this start share and no earlier start used.

    It must be agreed on because torchrun keeps its store, with the addresses of dead processes in
    it, when it restarts processes, and its restart count may differ between machines.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("start", name)
        tokens = [store.get(f"{name}/{other}").decode() for other in range(1, size)]
        store.set(f"{name}/tokens", " ".join(tokens))
        return name
    token = uuid.uuid4().hex
    while True:
        name = store.get("start").decode()  # of an earlier start, unless its list has our token
        store.set(f"{name}/{rank}", token)
        if store.check([f"{name}/tokens"]) and token in store.get(f"{name}/tokens").decode():
            return name
        time.sleep(0.02)


def _choose_interface(address: str) -> None:
    """Make gloo use the interface that leads to `address`, unless GLOO_SOCKET_IFNAME is set.

    Gloo would use the interface that the hostname resolves to, which often is loopback.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not sys.platform.startswith("linux"):
        return
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((address, 1))  # sends nothing; selects the route
        own_address = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                if fcntl.ioctl(probe, get_address, request)[20:24] == own_address:
                    os.environ["GLOO_SOCKET_IFNAME"] = name


def _end_with_parent() -> None:
    """Have Linux send SIGTERM when the process that started this one dies."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(set_parent_death_signal, signal.SIGTERM)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_to_fail(*, lost_peer: bool = False) -> bool:
    """Return whether this process failed first, so that it reports why the run ends.

    Args:
        lost_peer: This process failed because another one is gone. `launch` knows why and reports
            it, if it started the processes.
    """
    if _store is None:
        return True
    if lost_peer and LAUNCHED in os.environ:
        return False
    return claim_failure(_store)


def claim_failure(store: dist.Store) -> bool:
    """Record a failure in the store and return whether it is the first one."""
    try:
        return bool(store.add(_FAILURES, 1) == 1)
    except RuntimeError:  # the process that kept the store is gone
        return True


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def min_over_processes(value: int, device: torch.device) -> int:
    """Return the smallest value of all processes."""
    if not dist.is_initialized():
        return value
    least = torch.tensor(value, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least.item())


def gather_rows(rows: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, which have one shape, in rank order."""
    if not dist.is_initialized():
        return [rows]
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows)
    return gathered


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Copy the main process's buffers, such as BatchNorm statistics, to all processes."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, in rank order.

    Only the main process gets them; the others get an empty list.
    """
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(value, gathered if dist.get_rank() == 0 else None, group=_host)
    return gathered if dist.get_rank() == 0 else []


def from_main(make: Callable[[], _Value]) -> _Value:
    """Call `make` in the main process and return its result in every process."""
    if not dist.is_initialized():
        return make()
    values = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, group=_host)
    return values[0]  # type: ignore[return-value]


def any_process(flag: bool, device: torch.device) -> bool:
    """Return True in all processes if `flag` is True in one."""
    if not dist.is_initialized():
        return flag
    total = torch.tensor([float(flag)], device=device)
    return bool(sum_over_processes(total).item())


def barrier() -> None:
    """Wait for all processes, on the host: GPUs keep working, and nothing waits for them."""
    if dist.is_initialized():
        dist.barrier(group=_host)


@contextlib.contextmanager
def in_turn(world: World) -> Iterator[None]:
    """Order work that may download files, so that no two processes download the same one.

    The main process goes first, then the first process of each other machine, then the rest.
    """
    turn = 0 if world.is_main else 1 if world.local_rank == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()
