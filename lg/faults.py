"""What ends a run, in one line for people: what happened, where, and the way out."""

from __future__ import annotations

import sys
import traceback

import torch
import torch.distributed as dist

from lg.checkpoint import CheckpointError
from lg.config import ConfigError
from lg.datasets.base import DataError
from lg.distributed import speaks_for_all
from lg.guidance import BankError
from lg.metrics import NonFiniteLossError

# What a user can mend, and whose message says how.
_TOLD = (BankError, CheckpointError, ConfigError, DataError, NonFiniteLossError, OSError)
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_WAYS_OUT = (
    "Ways out that keep the recipe: {accumulate}TRAIN.MIXED_PRECISION True; else a smaller "
    "TRAIN.BATCH_SIZE. TEST.BATCH_SIZE {test} and DATA_LOADER.NUM_WORKERS take memory as well, and "
    "so do images kept decoded (DATA_LOADER.BACKEND workers keeps none)."
)


def tell(
    error: Exception, *, batch_size: int, accum_steps: int, test_batch_size: int, mixed: bool
) -> None:
    """Says why the run ends on standard error, from the one process whose fault it is.

    A fault of the program itself, which no user can mend, is told with its traceback.

    Args:
        error: What ends the run.
        batch_size: TRAIN.BATCH_SIZE.
        accum_steps: TRAIN.ACCUM_STEPS.
        test_batch_size: TEST.BATCH_SIZE.
        mixed: Whether precision is mixed.
    """
    lost = is_lost_peer(error)
    if not speaks_for_all(lost_peer=lost):
        return
    if isinstance(error, _TOLD):
        line = str(error)
    elif lost:
        line = (
            f"Contact with the other processes is lost ({_first_line(error)}): one was ended from "
            "outside, or its machine or the network failed. The same command goes on from the last "
            "checkpoint."
        )
    elif is_out_of_memory(error):
        precision = "mixed precision" if mixed else "fp32"
        parts = f"TRAIN.ACCUM_STEPS {2 * accum_steps} (half as much at a time); "
        ways = _WAYS_OUT.format(
            accumulate=parts if batch_size % (2 * accum_steps) == 0 else "", test=test_batch_size
        )
        if mixed:
            ways = ways.replace("TRAIN.MIXED_PRECISION True; else ", "")
        line = (
            f"Out of memory with TRAIN.BATCH_SIZE {batch_size}, TRAIN.ACCUM_STEPS {accum_steps} in "
            f"{precision} ({_first_line(error)}). {ways}"
        )
    elif str(error).startswith("DataLoader worker"):
        line = (
            f"A process that reads images has died ({_first_line(error)}). Often memory ran out: "
            "lower DATA_LOADER.NUM_WORKERS. The same command goes on from the last checkpoint."
        )
    elif str(error).startswith("Expected more than 1 value per channel"):
        line = (
            f"A BatchNorm of the model got a single value, with TRAIN.BATCH_SIZE {batch_size} and "
            f"TRAIN.ACCUM_STEPS {accum_steps} ({_first_line(error)}): raise the first, or lower "
            "the second."
        )
    elif str(error).startswith("DataLoader timed out"):
        line = (
            f"No images have come for long ({_first_line(error)}). Check the disk or network that "
            "DATA_LOADER.ROOT is on, or raise DATA_LOADER.TIMEOUT."
        )
    else:
        traceback.print_exception(error)
        return
    print(f"Error: {line}", file=sys.stderr, flush=True)


def is_lost_peer(error: Exception) -> bool:
    """Whether the error is that another process has gone, rather than one of this process."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory of this machine or its GPU ran out."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(part in text for part in _NO_MEMORY)
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160].rstrip(".") if lines else type(error).__name__
