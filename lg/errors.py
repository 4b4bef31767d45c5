"""Errors that users can fix, and how a failed run is reported.

Modules that are loaded before torch raise these errors, so functions import torch themselves.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence


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


class ExportError(UserError):
    """A model that cannot be exported, or whose export computes something else."""


class BankError(UserError):
    """Stored features that cannot be used."""


class NonFiniteLossError(UserError):
    """A loss or weight became infinite or NaN."""


# Where torch raises a plain RuntimeError from C++, its text is the only mark of the cause.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_LOST_PEER = "gloo"  # in the path of the source file that gloo's messages begin with

_RESUME = "Run the same command to resume from the last checkpoint."


def report_failure(
    error: Exception, *, batch_size: int, accum_steps: int, test_batch_size: int, mixed: bool
) -> None:
    """Print why the run ends to standard error, in the first process that failed.

    Errors that users can fix are one line; all others keep their traceback.

    Args:
        error: What ended the run.
        batch_size: TRAIN.BATCH_SIZE.
        accum_steps: TRAIN.ACCUM_STEPS.
        test_batch_size: TEST.BATCH_SIZE.
        mixed: TRAIN.MIXED_PRECISION.
    """
    from lg.distributed import is_first_to_fail

    lost = is_lost_peer(error)
    if not is_first_to_fail(lost_peer=lost):
        return
    sizes = f"TRAIN.BATCH_SIZE {batch_size} and TRAIN.ACCUM_STEPS {accum_steps}"
    cause = first_line(error)
    if isinstance(error, (UserError, OSError)):
        line = str(error)
    elif lost:
        line = (
            f"Lost contact with the other processes ({cause}): one was killed, or its machine or "
            f"the network failed. {_RESUME}"
        )
    elif is_out_of_memory(error):
        advice = memory_advice(
            batch_size=batch_size,
            accum_steps=accum_steps,
            test_batch_size=test_batch_size,
            mixed=mixed,
        )
        precision = "mixed precision" if mixed else "fp32"
        line = f"Out of memory with {sizes} in {precision} ({cause}). {advice}"
    elif _is_from_image_workers(error):
        line = (
            f"Reading images failed ({cause}): if memory ran out, lower DATA_LOADER.NUM_WORKERS; "
            "if reading is slow, check the disk or network of DATA_LOADER.ROOT or raise "
            f"DATA_LOADER.TIMEOUT. {_RESUME}"
        )
    elif _is_from_batch_norm(error):
        line = (
            f"A BatchNorm of the model got one value per channel ({cause}) with {sizes}: raise the "
            "first or lower the second."
        )
    else:
        traceback.print_exception(error)
        return
    print(f"Error: {line}", file=sys.stderr, flush=True)


def memory_advice(*, batch_size: int, accum_steps: int, test_batch_size: int, mixed: bool) -> str:
    """Return which settings need less memory; those that keep the recipe come first.

    The arguments are those of `report_failure`.
    """
    keeping = (
        [f"TRAIN.ACCUM_STEPS {2 * accum_steps}"] if batch_size % (2 * accum_steps) == 0 else []
    )
    if not mixed:
        keeping.append("TRAIN.MIXED_PRECISION True")
    first = f"Set {' or '.join(keeping)}, which keep the recipe, or lower" if keeping else "Lower"
    return (
        f"{first} TRAIN.BATCH_SIZE. TEST.BATCH_SIZE {test_batch_size}, DATA_LOADER.NUM_WORKERS and "
        "decoded images (none with DATA_LOADER.BACKEND workers) take memory too."
    )


def is_lost_peer(error: Exception) -> bool:
    """Return whether the error is that another process is gone, not one of this process."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _LOST_PEER in str(error)
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory of this machine or its GPU ran out."""
    import torch

    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(part in text for part in _OUT_OF_MEMORY)
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 160 characters, or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0][:160].rstrip(".") if lines else type(error).__name__


def first_few(names: Sequence[str], count: int = 5) -> str:
    """Return the first names as text, and how many more there are."""
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more:,} more" if more > 0 else "")


def _is_from_image_workers(error: Exception) -> bool:
    """Return whether torch's loader raised the error: a worker died or timed out.

    An error that a worker raised does not count; torch re-raises that elsewhere.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals["__name__"] if frames else ""
    return isinstance(error, RuntimeError) and module.startswith("torch.utils.data.")


def _is_from_batch_norm(error: Exception) -> bool:
    """Return whether a BatchNorm rejected its input, which must be a single value per channel."""
    from torch.nn.functional import batch_norm

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, ValueError) and any(
        frame.f_code is batch_norm.__code__ for frame in frames
    )
