"""Devices: which one is selected, its precision, and errors if it is not available."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import lg
from lg.builders.training import build_device, build_precision, precision_hint, precision_note
from lg.device import (
    Precision,
    computes_in_bf16,
    core_wait_seconds,
    peak_memory_mb,
    select_device,
    to_device_together,
)
from lg.distributed import World

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
    with pytest.raises(ValueError, match="DEVICE is cuda, but torch finds no GPU: set DEVICE cpu"):
        select_device("cuda")
    with pytest.raises(ValueError, match=r"DEVICE is mps, .* set DEVICE auto"):
        select_device("mps")
    # Many processes may share a CPU.
    assert select_device("auto", local_rank=5) == CPU


def dtype_inside(precision: Precision) -> torch.dtype:
    with precision.autocast():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, *, bf16: bool, amx: bool = False) -> None:
    """Simulate an x86 processor with or without instructions for bf16."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


def test_a_cpu_that_emulates_bf16_stays_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for bf16, amx in ((False, False), (True, False), (False, True)):
        pretend_cpu(monkeypatch, bf16=bf16, amx=amx)
        assert computes_in_bf16(CPU) == (bf16 or amx)
    pretend_cpu(monkeypatch, bf16=False)
    automatic, forced = (Precision(CPU, mixed=True, dtype=name) for name in ("auto", "bf16"))
    assert (str(automatic), dtype_inside(automatic)) == ("fp32", torch.float32)
    assert (str(forced), dtype_inside(forced)) == ("bf16", torch.bfloat16)
    notes = []
    for dtype in ("auto", "bf16"):
        opts = ["TRAIN.MIXED_PRECISION", "True", "TRAIN.AMP_DTYPE", dtype, "DEVICE", "cpu"]
        cfg = lg.load_config("configs/digits/vit_digits_base.yaml", opts)
        notes.append(precision_note(cfg, build_precision(cfg, CPU)))
    assert "training in fp32 (set TRAIN.AMP_DTYPE bf16" in notes[0] and notes[1] == ""
    full = lg.load_config("configs/digits/vit_digits_base.yaml", ["DEVICE", "cpu"])
    assert precision_note(full, build_precision(full, CPU)) == ""
    assert precision_hint(full, build_precision(full, CPU)) == ""
    pretend_cpu(monkeypatch, bf16=True)
    assert "TRAIN.MIXED_PRECISION True" in precision_hint(full, build_precision(full, CPU))
    full.defrost()
    full.TRAIN.MIXED_PRECISION = True
    assert precision_hint(full, build_precision(full, CPU)) == ""


def test_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpu(monkeypatch, bf16=True)
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


def test_determinism_is_set_and_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    opts = ["CUDNN.BENCHMARK", "False", "DEVICE", "cpu", "TRAIN.DETERMINISTIC"]
    config = "configs/digits/vit_digits_base.yaml"
    try:
        build_device(lg.load_config(config, [*opts, "True"]), World())
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        build_device(lg.load_config(config, [*opts, "False"]), World())
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_peak_memory_is_in_mb_and_never_falls() -> None:
    before = peak_memory_mb(CPU)
    block = torch.ones(64, 1024, 1024)  # 256 MB, touched
    after = peak_memory_mb(CPU)
    del block
    assert 20 < before < 100_000 and isinstance(before, int)
    assert before <= after <= before + 400
    assert after >= 256
    assert peak_memory_mb(CPU) >= after


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


def test_arrays_of_all_types_are_copied_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []

    def copy(values: np.ndarray, device: torch.device) -> torch.Tensor:
        copied.append(device)
        return torch.from_numpy(values.copy())

    monkeypatch.setattr("lg.device.to_device", copy)
    rng = np.random.default_rng(0)
    arrays = [
        rng.random((3, 5)),
        rng.random(7) < 0.5,
        np.empty((0, 1, 256), np.uint8),
        rng.integers(0, 9, (2, 3)).T,
        rng.random((5, 1, 2)).astype(np.float32),
        np.arange(5, dtype=np.uint8),
    ]
    moved = to_device_together(arrays, torch.device("cuda"))
    assert len(copied) == 1
    for array, tensor in zip(arrays, moved, strict=True):
        assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)
    assert to_device_together([], torch.device("cuda")) == []
    for array, tensor in zip(arrays, to_device_together(arrays, torch.device("cpu")), strict=True):
        assert np.array_equal(tensor.numpy(), array)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_two_programs_on_one_core_wait_for_each_other() -> None:
    busy = "import time\nend = time.time() + 0.6\nwhile time.time() < end: pass\n"
    code = (
        "import os, subprocess, sys\n"
        "from lg.device import core_wait_seconds\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        f"other = subprocess.Popen([sys.executable, '-c', {busy!r}])\n"
        "before = core_wait_seconds()\n"
        f"exec({busy!r})\n"
        "print(core_wait_seconds() - before)\n"
        "other.wait()\n"
    )
    command = [sys.executable, "-c", code]
    waited = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.1 < waited < 0.7
    assert core_wait_seconds() >= 0
