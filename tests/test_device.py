"""Devices: which one is selected, its precision, and errors if it is not available."""

from __future__ import annotations

import platform
import subprocess
import sys
from typing import Any

import pytest
import torch

from lg.device import Precision, peak_memory_mb, select_device, synchronize

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, mps: bool = False) -> list[int]:
    """Simulate a machine with these devices; return the list of GPUs that get selected."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    return chosen


@pytest.mark.parametrize(
    ("gpus", "mps", "wanted"),
    [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda:0"), (2, True, "cuda:0")],
)
def test_auto_selects_the_best_device(
    monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, wanted: str
) -> None:
    pretend(monkeypatch, gpus=gpus, mps=mps)
    assert select_device("auto") == torch.device(wanted)
    assert select_device("cpu") == CPU


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = pretend(monkeypatch, gpus=2)
    assert [select_device("cuda", local_rank=r) for r in (0, 1)] == [
        torch.device("cuda", 0),
        torch.device("cuda", 1),
    ]
    assert chosen == [0, 1]
    for kind in ("cuda", "auto"):
        with pytest.raises(ValueError, match=r"Process 2 .* torch sees 2: lower NUM_GPUS"):
            select_device(kind, local_rank=2)


def test_an_unavailable_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(ValueError, match=r"torch sees 0: .* DEVICE cpu"):
        select_device("cuda")
    with pytest.raises(ValueError, match=r"DEVICE is mps, .* set DEVICE auto"):
        select_device("mps")
    # Many processes may share a CPU.
    assert select_device("auto", local_rank=5) == CPU


def dtype_inside(precision: Precision) -> torch.dtype:
    with precision.autocast():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_precision_on_a_cpu() -> None:
    full = Precision(CPU)
    assert (str(full), full.dtype, dtype_inside(full)) == ("fp32", None, torch.float32)
    for name in ("auto", "bf16"):
        mixed = Precision(CPU, mixed=True, dtype=name)
        assert (str(mixed), mixed.dtype, dtype_inside(mixed)) == (
            "bf16",
            torch.bfloat16,
            torch.bfloat16,
        )
    for precision in (full, mixed):
        assert not precision.scaler.is_enabled()
        assert float(precision.scaler.scale(torch.tensor(3.0))) == 3.0
    with pytest.raises(ValueError, match=r"TRAIN.AMP_DTYPE is fp16.*bf16 or auto"):
        Precision(CPU, mixed=True, dtype="fp16")
    # Without mixed precision AMP_DTYPE has no effect.
    assert str(Precision(CPU, mixed=False, dtype="fp16")) == "fp32"


@pytest.mark.parametrize(
    ("capability", "dtype", "wanted"),
    [((7, 5), "auto", "fp16"), ((8, 0), "auto", "bf16"), ((9, 0), "auto", "bf16"),
     ((9, 0), "fp16", "fp16"), ((7, 5), "bf16", "bf16")],
)  # fmt: skip
def test_auto_is_bf16_if_the_gpu_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str, wanted: str
) -> None:
    made: list[tuple[str, bool]] = []

    def scaler(device: str, enabled: bool) -> Any:
        made.append((device, enabled))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    precision = Precision(torch.device("cuda", 0), mixed=True, dtype=dtype)
    assert str(precision) == wanted
    assert made == [("cuda", wanted == "fp16")]  # only fp16 scales the loss


def test_peak_memory_is_in_mb_and_never_falls() -> None:
    before = peak_memory_mb(CPU)
    block = torch.ones(64, 1024, 1024)  # 256 MB, touched
    after = peak_memory_mb(CPU)
    del block
    assert 20 < before < 100_000 and isinstance(before, int)
    assert before <= after <= before + 400
    assert after >= 256
    assert peak_memory_mb(CPU) >= after


def test_synchronize_accepts_a_cpu() -> None:
    synchronize(CPU)


def test_freed_memory_is_reused() -> None:
    """Count the pages that the system clears for 12 blocks of 64 MB, one after the other."""
    code = """
import resource, torch
from lg.device import reuse_memory
if {reused}:
    reuse_memory()
torch.ones(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = [
        int(subprocess.check_output([sys.executable, "-c", code.format(reused=reused)]))
        for reused in (False, True)
    ]
    # An aligned block of torch does not always fit where the last one was.
    limit = 0.8 if platform.libc_ver()[0] == "glibc" else 1.1
    assert faults[0] > 11 * 2**14 or limit > 1, faults
    assert faults[1] < limit * faults[0], faults
