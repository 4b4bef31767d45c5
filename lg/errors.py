"""Errors that users can fix, and how a failed run is reported.

Modules that are loaded before torch raise these errors, so torch is imported inside functions.
"""

from __future__ import annotations

import sys
import traceback


class UserError(ValueError):
    """An error the user can fix. The message names the cause, its value and the fix."""


class ConfigError(UserError):
    """A config that cannot be used."""


class DataError(UserError):
    """A data set that cannot be read as requested."""


class StuckError(DataError):
    """Timed out waiting for an image. The thread that reads it cannot be stopped."""


class CheckpointError(UserError):
    """A file that cannot be used as a checkpoint."""


class BankError(UserError):
    """A feature file that cannot be used."""


class NonFiniteLossError(UserError):
    """A loss or weight became infinite or NaN."""


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
    from lg.distributed import reports_failure

    lost = is_lost_peer(error)
    if not reports_failure(lost_peer=lost):
        return
    if isinstance(error, (UserError, OSError)):
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
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory of this machine or its GPU ran out."""
    import torch

    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(part in text for part in _NO_MEMORY)
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160].rstrip(".") if lines else type(error).__name__
