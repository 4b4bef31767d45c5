"""Compile student and guide with torch.compile, or leave them uncompiled if that fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lg.device import Precision
from lg.errors import first_line
from lg.guidance import FrozenTeacher, GuidedStudent
from lg.guidance.losses import KeptMap

_TRIES = 3  # CUDA graphs: the first call runs, the second records, the third replays


def compile_student(
    guided: GuidedStudent,
    guide: Any,
    mode: str,
    *,
    example: Tensor,
    precision: Precision,
    ends: bool = False,
    info: Callable[[str], None],
    warn: Callable[[str], None],
) -> tuple[nn.Module, Any]:
    """Compile the forward and backward pass of training and try both on an example, three times.

    Without guidance the student runs other code. If guidance ends during the training, that is
    compiled and tried now as well, so that a failure does not stop the run at that epoch.

    The trial does not change weights, statistics or random streams.

    Args:
        guided: The student in training, on its device.
        guide: The guide; a teacher is compiled in the same mode, stored maps are not.
        mode: Of torch.compile; `reduce-overhead` and `max-autotune` use CUDA graphs on GPUs.
        example: [N, C, S, S], of the shape and type of training images.
        precision: Of the forward pass.
        ends: Whether guidance may end before the training does.
        info: Logs a line.
        warn: Logs a warning.

    Returns:
        The compiled student and guide over the same weights; `guided` and `guide` themselves, with
        a warning, if they cannot be compiled.
    """
    started = time.perf_counter()
    compiled: Any = torch.compile(guided, mode=mode, dynamic=False)
    teacher: Any = None
    if isinstance(guide, FrozenTeacher):
        teacher = torch.compile(guide, mode=mode, dynamic=False)
    buffers = {name: buffer.clone() for name, buffer in guided.named_buffers()}
    devices = [example.device] if example.is_cuda else []
    guided.train()
    try:
        with torch.random.fork_rng(devices=devices):
            for imitate in (True, False) if ends else (True,):
                for _ in range(_TRIES):
                    _try_step(compiled, teacher if imitate else None, example, precision, imitate)
                    guided.zero_grad(set_to_none=True)  # replays overwrite gradients in graphs
    except Exception as error:  # compiler back ends raise errors of any type
        reason = first_line(error)
        warn(f"TRAIN.COMPILE {mode} failed ({reason}): student and guide run uncompiled.")
        return guided, guide
    finally:
        with torch.no_grad():
            for name, buffer in guided.named_buffers():
                buffer.copy_(buffers[name])
        guided.zero_grad(set_to_none=True)
    info(f"Compiled the student in {time.perf_counter() - started:.0f} s (TRAIN.COMPILE {mode}).")
    return compiled, guide if teacher is None else teacher


def _try_step(
    student: Any, teacher: Any, example: Tensor, precision: Precision, imitate: bool
) -> None:
    """Run student and teacher forward, then the student backward, as training does."""
    with precision.autocast():
        logits, maps = student(example, imitate=imitate)
        maps = [m.features if isinstance(m, KeptMap) else m for m in maps]
        if teacher is not None:
            maps = [*maps, *teacher(example, None, None)[0]]
    outputs = [*(logits if isinstance(logits, tuple) else [logits]), *maps]
    torch.stack([output.float().mean() for output in outputs]).sum().backward()


def limit_compile_workers(local_size: int) -> None:
    """Let the processes of this machine share its cores for compilation.

    By default each process starts as many workers as there are cores, 32 at most.
    TORCHINDUCTOR_COMPILE_THREADS overrides it.
    """
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        from torch._inductor import config

        config.compile_threads = max(1, (config.compile_threads or 1) // local_size)
