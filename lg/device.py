"""Devices, their precision and their memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import resource
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Share of its time that training may wait for a core before it is reported: with two programs of
# one thread on one core it is half.
MAX_CORE_WAIT = 0.2


def core_wait_advice() -> str:
    """Return what to do about other programs on the same cores."""
    text = "Other programs, or too many DATA_LOADER.NUM_WORKERS, use the same cores."
    if torch.get_num_threads() == 1:
        return text
    return (
        f"{text} If they cannot be stopped, set the environment variable GOMP_SPINCOUNT=1000 or "
        "OMP_NUM_THREADS=1: threads that wait for each other occupy the cores that the others need."
    )


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_wait_seconds() -> float:
    """Return how long this thread has been ready to run without a core; 0 except on Linux.

    Source: run_delay in the kernel's Documentation/scheduler/sched-stats.rst.
    """
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def select_device(kind: str, *, local_rank: int = 0) -> torch.device:
    """Return the device of this process.

    Args:
        kind: `auto` (CUDA, else MPS, else CPU), `cpu`, `cuda` or `mps`.
        local_rank: Number of the process on this machine; selects the GPU.

    Raises:
        ValueError: The device is not available, or there are fewer GPUs than processes.
    """
    has_mps = torch.backends.mps.is_available()
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if kind == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError("DEVICE is cuda, but torch finds no GPU: set DEVICE cpu.")
        if local_rank >= count:
            raise ValueError(
                f"Process {local_rank} of this machine needs its own GPU, but torch sees {count}: "
                "lower NUM_GPUS, or set DEVICE cpu."
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if kind == "mps" and not has_mps:
        raise ValueError("DEVICE is mps, but torch finds no such device: set DEVICE auto.")
    return torch.device(kind)


def reuse_memory() -> None:
    """Make glibc keep freed memory for the next step; other C libraries are left alone.

    By default glibc returns large blocks to the system, which clears them page by page when the
    next step allocates them again. That takes up to two fifths of a step.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # Versions before 2.35 accept at most 32 MB.
        if libc.mallopt(mmap_threshold, 2**28) or libc.mallopt(mmap_threshold, 2**25):
            libc.mallopt(trim_threshold, 2**31 - 1)


def allow_tf32(allowed: bool) -> None:
    """Set whether GPUs may round the factors of float32 products to TF32.

    By default torch allows it in convolutions and not in matrix products.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def make_deterministic(enabled: bool) -> None:
    """Set whether torch uses only operations that give the same bits each time.

    Call it before the first computation on a GPU. An operation that has no such form raises an
    error on GPUs.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.deterministic = enabled


def computes_in_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bf16 numbers; others convert them, which is slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        # torch's own check also accepts processors on which oneDNN emulates bf16.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Precision:
    """Full or mixed precision: the autocast context and, for fp16, the loss scaler.

    Attributes:
        device: Where the forward pass runs.
        dtype: Of autocast; None in full precision.
        scaler: Has no effect unless dtype is float16.
    """

    def __init__(self, device: torch.device, *, mixed: bool = False, dtype: str = "auto") -> None:
        """Select the precision.

        Args:
            device: Where the forward pass runs.
            mixed: Whether precision is mixed.
            dtype: bf16, fp16 or auto: bf16 if the hardware computes in it, else fp16 on GPUs and
                full precision on CPUs.

        Raises:
            ValueError: fp16 on a CPU.
        """
        self.device = device
        self.dtype: torch.dtype | None = None
        on_cpu = device.type == "cpu"
        if mixed and dtype == "auto":
            dtype = "bf16" if computes_in_bf16(device) else "fp32" if on_cpu else "fp16"
        if mixed and dtype == "fp16" and on_cpu:
            raise ValueError(
                "TRAIN.AMP_DTYPE is fp16, which CPUs do not support: set it to bf16 or auto."
            )
        if mixed and dtype != "fp32":
            self.dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager:
        """Return the context for forward passes."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def __str__(self) -> str:
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]


def to_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Copy from host memory to a device without waiting for the copy."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_device_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy arrays from host memory to a device in one transfer, without waiting for it."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type != "cuda" or not tensors:
        return [tensor.to(device) for tensor in tensors]
    ends = np.cumsum([-(-tensor.nbytes // 16) * 16 for tensor in tensors])  # aligned for any type
    starts = [0, *ends[:-1]]
    buffer = np.empty(ends[-1], np.uint8)
    for tensor, start in zip(tensors, starts, strict=True):
        buffer[start : start + tensor.nbytes] = tensor.numpy().reshape(-1).view(np.uint8)
    moved = to_device(buffer, device)
    return [
        moved[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, starts, strict=True)
    ]


def machine_facts(device: torch.device) -> dict[str, str]:
    """Return the facts about the machine that a run logs: `hardware`, `torch` and `python`."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "GPU"
        count = usable_cores()
        cores = f"{count} core{'s' * (count > 1)}"
        hardware = f"{device.type} {_cpu_name()} {kind}, {cores}"
    return {
        "hardware": hardware,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    """Return the model of the CPU, or its architecture where the system does not tell."""
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        return names[0] if names else platform.machine()
    return platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; CPUs always have."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_mb(device: torch.device) -> int:
    """Return the peak memory in MB (1024^2 bytes).

    On a GPU it is the memory that torch allocated; elsewhere the resident memory of the process.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device) / 1024**2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return int(peak / (1024**2 if sys.platform == "darwin" else 1024))


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of this machine and its container (cgroup v2)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
        most, used = (
            int(Path("/sys/fs/cgroup", name).read_text())
            for name in ("memory.max", "memory.current")
        )
        limits.append(max(0, most - used))
    except (OSError, ValueError, KeyError):
        pass  # not Linux, or no limit
    return min(limits)
