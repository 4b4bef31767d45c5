"""What a user sees when a run ends with a fault."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import run_net
from lg import errors, trainer

ROOT = Path(__file__).parents[1]
SIZES = {"batch_size": 128, "accum_steps": 2, "test_batch_size": 200, "mixed": False}


def told(error: Exception, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    errors.tell(error, **(SIZES | changes))
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_memory_that_runs_out_names_the_ways_out(capsys: pytest.CaptureFixture[str]) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    assert told(error, capsys) == (
        "Error: Out of memory with TRAIN.BATCH_SIZE 128, TRAIN.ACCUM_STEPS 2 in fp32 (CUDA out of "
        "memory. Tried to allocate 2 GiB). Ways out that keep the recipe: TRAIN.ACCUM_STEPS 4 "
        "(half as much at a time); TRAIN.MIXED_PRECISION True; else a smaller TRAIN.BATCH_SIZE. "
        "TEST.BATCH_SIZE 200 and DATA_LOADER.NUM_WORKERS take memory as well, and so do images "
        "kept decoded (DATA_LOADER.BACKEND workers keeps none).\n"
    )
    # What has been done already, or cannot be done, is not advised.
    odd = told(error, capsys, batch_size=6, mixed=True)
    assert "in mixed precision" in odd and "MIXED_PRECISION" not in odd
    assert "TRAIN.ACCUM_STEPS 4" not in odd


def test_memory_of_the_machine_that_runs_out_is_seen_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**52)
    assert told(info.value, capsys).startswith("Error: Out of memory with TRAIN.BATCH_SIZE 128")
    assert told(MemoryError(), capsys).startswith("Error: Out of memory with")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "has died"),
        (RuntimeError("DataLoader timed out after 9 seconds"), "DATA_LOADER.TIMEOUT"),
        (ValueError("Expected more than 1 value per channel, got x"), "TRAIN.BATCH_SIZE 128"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] closed by peer"), "Contact with the other"),
        (dist.DistNetworkError("timed out"), "Contact with the other processes is lost"),
        (OSError(28, "No space left on device", "/x"), "No space left on device: '/x'"),
    ],
)
def test_what_others_report_becomes_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told(error, capsys)
    assert said.startswith("Error: ") and line in said and said.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError("conv9")
    except KeyError as error:
        said = told(error, capsys)
    assert said.startswith("Traceback (most recent call last):")
    assert said.rstrip().endswith("KeyError: 'conv9'")


# A data set whose image 3 never comes, in a run of its own process.
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
def test_images_that_never_come_end_the_run(backend: str, tmp_path: Path) -> None:
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
        "workers": r"Error: No images have come for long \(DataLoader timed out after 2 seconds\). "
        "Check the disk or network that DATA_LOADER.ROOT is on, or raise DATA_LOADER.TIMEOUT.\n",
    }
    assert re.fullmatch(expected[backend], done.stderr)


def test_an_unexpected_fault_ends_with_status_one(
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
