"""Compile the student with torch.compile, or leave it uncompiled if that fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lg.device import Precision
from lg.guidance import GuidedStudent


def compile_student(
    guided: GuidedStudent,
    mode: str,
    *,
    example: Tensor,
    precision: Precision,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> nn.Module:
    """Compile the forward and backward pass of training and try both on an example.

    The trial does not change weights, statistics or random streams.

    Args:
        guided: The student in training, on its device.
        mode: Of torch.compile; `reduce-overhead` and `max-autotune` use CUDA graphs on GPUs.
        example: [N, 3, S, S], of the shape and type of training images.
        precision: Of the forward pass.
        say: Prints a line.
        warn: Prints a warning.

    Returns:
        The compiled module over the same weights; `guided` itself, with a warning, if it cannot be
        compiled.
    """
    started = time.perf_counter()
    compiled: Any = torch.compile(guided, mode=mode, dynamic=False)
    buffers = {name: buffer.clone() for name, buffer in guided.named_buffers()}
    devices = [example.device] if example.is_cuda else []
    guided.train()
    try:
        with torch.random.fork_rng(devices=devices):
            with precision.autocast():
                logits, maps = compiled(example)
            outputs = [*(logits if isinstance(logits, tuple) else [logits]), *maps]
            torch.stack([output.float().mean() for output in outputs]).sum().backward()
    except Exception as error:  # compiler back ends raise errors of any type
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        warn(f"TRAIN.COMPILE {mode} failed ({reason}): the student runs uncompiled.")
        return guided
    finally:
        with torch.no_grad():
            for name, buffer in guided.named_buffers():
                buffer.copy_(buffers[name])
        guided.zero_grad(set_to_none=True)
    say(f"Compiled the student in {time.perf_counter() - started:.0f} s (TRAIN.COMPILE {mode}).")
    return compiled
