"""How long this machine trains on one image."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from yacs.config import CfgNode

from lg.builders import build_device, build_guided, place_model
from lg.device import Precision, computes_in_bf16, synchronize
from lg.distributed import World

_BATCH = 16  # images of a measured step
_REPEATS = 2  # measured steps, after one that is not counted


class Speed(NamedTuple):
    """How fast a model trains here."""

    seconds: float  # for one image
    mixed: bool  # whether that takes TRAIN.MIXED_PRECISION


def measure_speed(cfg: CfgNode) -> Speed:
    """Measure forward and backward, with the guide if there is one, in the faster precision.

    Time without a core, because other programs use them at the moment, is not counted. Weights are
    random.
    """
    device = build_device(cfg, World())
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # about the guide's weights
        guided, guide, loss = build_guided(cfg)
        guided.to(device).train()
        if isinstance(guide, torch.nn.Module):
            guide.to(device)
        side = cfg.MODEL.IMG_SIZE
        images = torch.rand(_BATCH, cfg.MODEL.IN_CHANNELS, side, side, device=device)
        targets = torch.full((_BATCH, cfg.MODEL.NUM_CLASSES), 1 / cfg.MODEL.NUM_CLASSES)
        targets = targets.to(device)

        def step(precision: Precision) -> None:
            with precision.autocast():
                logits, maps = guided(images, imitate=True)
                imitated = guide(images)
            loss(logits, maps, targets, *imitated, factor=1.0)["loss"].backward()
            synchronize(device)

        speeds = []
        for mixed in [False, True] if computes_in_bf16(device) else [False]:
            precision = Precision(device, mixed=mixed)
            place_model(guided.student, precision)
            speeds.append(Speed(_time(step, precision), mixed))
        return min(speeds)


def _time(step: Callable[[Precision], None], precision: Precision) -> float:
    """Return the seconds of a step for one image, the best of some."""
    # On CPUs, forward and backward run in this thread, which does not count time without a core.
    clock = time.thread_time if precision.device.type == "cpu" else time.perf_counter
    seconds = []
    for _ in range(1 + _REPEATS):
        started = clock()
        step(precision)
        seconds.append(clock() - started)
    return min(seconds[1:]) / _BATCH
