"""What a user sees when a run fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import run_net
from lg import errors, trainer

ROOT = Path(__file__).parents[1]
SIZES = {"batch_size": 128, "accum_steps": 2, "test_batch_size": 200, "mixed": False}


def report(error: Exception, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    errors.report_failure(error, **(SIZES | changes))
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_out_of_memory_names_the_settings_that_need_less(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    assert report(error, capsys) == (
        "Error: Out of memory with TRAIN.BATCH_SIZE 128 and TRAIN.ACCUM_STEPS 2 in fp32 (CUDA out "
        "of memory. Tried to allocate 2 GiB). Set TRAIN.ACCUM_STEPS 4 or TRAIN.MIXED_PRECISION "
        "True, which keep the recipe, or lower TRAIN.BATCH_SIZE. TEST.BATCH_SIZE 200, "
        "DATA_LOADER.NUM_WORKERS and decoded images (none with DATA_LOADER.BACKEND workers) take "
        "memory too.\n"
    )
    # Settings that are on already, or cannot be set, are not advised.
    odd = report(error, capsys, batch_size=6, mixed=True)
    assert "in mixed precision" in odd and "MIXED_PRECISION" not in odd
    assert "TRAIN.ACCUM_STEPS 4" not in odd and "). Lower TRAIN.BATCH_SIZE." in odd


def test_out_of_memory_on_the_cpu_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**52)
    assert report(info.value, capsys).startswith("Error: Out of memory with TRAIN.BATCH_SIZE 128")
    assert report(MemoryError(), capsys).startswith("Error: Out of memory with")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] closed by peer"), "Lost contact with the"),
        (dist.DistNetworkError("timed out"), "Lost contact with the other processes (timed out)"),
        (OSError(28, "No space left on device", "/x"), "No space left on device: '/x'"),
    ],
)
def test_errors_from_outside_are_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = report(error, capsys)
    assert printed.startswith("Error: ") and line in printed and printed.count("\n") == 1


class BadImages(Dataset[int]):
    """One image, at which the worker process is killed, hangs or raises an error."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "slow":
            time.sleep(3)
        raise RuntimeError("a bug in the worker")


@pytest.mark.parametrize("fault", ["killed", "slow", "bug"])
def test_a_worker_process_that_fails(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as info:
        list(DataLoader(BadImages(fault), num_workers=1, timeout=1 if fault == "slow" else 60))
    printed = report(info.value, capsys)
    if fault == "bug":
        assert printed.startswith("Traceback") and "a bug in the worker" in printed
        return
    cause = {"killed": r"DataLoader worker .*", "slow": "DataLoader timed out after 1 seconds"}
    assert re.fullmatch(
        rf"Error: Reading images failed \({cause[fault]}\): if memory ran out, lower "
        r"DATA_LOADER.NUM_WORKERS; if reading is slow, check the disk or network of "
        r"DATA_LOADER.ROOT or raise DATA_LOADER.TIMEOUT. Run the same command to resume .*\n",
        printed,
    )


def test_a_batch_norm_with_one_value_names_the_batch_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ValueError) as info:
        nn.Sequential(nn.BatchNorm2d(3))(torch.ones(1, 3, 1, 1))
    printed = report(info.value, capsys, batch_size=2)
    assert printed.startswith("Error: A BatchNorm of the model got one value per channel (")
    assert "TRAIN.BATCH_SIZE 2 and TRAIN.ACCUM_STEPS 2: raise the first" in printed


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for error_type in (KeyError, RuntimeError, ValueError):
        try:
            raise error_type("conv9")
        except error_type as error:
            printed = report(error, capsys)
        assert printed.startswith("Traceback (most recent call last):")
        assert "conv9" in printed.splitlines()[-1]


# A run whose image 3 is never read.
_STUCK = """
import sys, time
from lg.datasets import digits
image = digits.Digits.image
def never(self, index):
    if index == 3:
        time.sleep(1000)
    return image(self, index)
digits.Digits.image = never
import run_net
run_net.main()
"""


@pytest.mark.parametrize("backend", ["device", "workers"])
def test_an_image_that_is_never_read_ends_the_run(backend: str, tmp_path: Path) -> None:
    config = str(ROOT / "configs/digits/vit_digits_base.yaml")
    opts = f"DEVICE cpu DATA_LOADER.TIMEOUT 2 DATA_LOADER.NUM_WORKERS 1 OUT_DIR {tmp_path}".split()
    more = ["DATA_LOADER.BACKEND", backend, "TRAIN.FRACTION", "1.0"]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _STUCK, "--mode", "train", "--cfg", config, *opts, *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1 and time.monotonic() - started < 60
    expected = {
        "device": r"Error: digits/train image 3 \(.*\): timed out after 2 s waiting for the "
        "image; check its disk or network, or raise DATA_LOADER.TIMEOUT\n",
        "workers": r"Error: Reading images failed \(DataLoader timed out after 2 seconds\): .* "
        r"raise DATA_LOADER.TIMEOUT. .*\n",
    }
    assert re.fullmatch(expected[backend], done.stderr)


def test_a_bug_ends_with_status_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import lg

    def broken(cfg: Any) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(trainer, "train", broken)
    with pytest.raises(SystemExit) as end:
        run_net.run("train", lg.load_config(ROOT / "configs/digits/vit_digits_base.yaml"))
    assert end.value.code == 1
    assert capsys.readouterr().err.rstrip().endswith("ZeroDivisionError: no")
