"""How long this machine trains on one image."""

from __future__ import annotations

import time
import warnings

import torch
from yacs.config import CfgNode

from lg.builders import build_device, build_guided
from lg.device import core_wait_seconds, synchronize
from lg.distributed import World
from lg.models.layers import gains_from_channels_last

_BATCH = 8  # images of a measured step
_REPEATS = 2  # measured steps, after one that is not counted


def seconds_per_image(cfg: CfgNode) -> float:
    """Return the seconds of forward and backward, with the guide if there is one, for an image.

    Time without a core, because other programs use them at the moment, is not counted. Weights are
    random.
    """
    device = build_device(cfg, World())
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # about the guide's weights
        guided, guide, loss = build_guided(cfg)
        guided.to(device).train()
        if device.type == "cpu" and gains_from_channels_last(guided.student):
            guided.student.to(memory_format=torch.channels_last)
        if isinstance(guide, torch.nn.Module):
            guide.to(device)
        side = cfg.MODEL.IMG_SIZE
        images = torch.rand(_BATCH, cfg.MODEL.IN_CHANNELS, side, side, device=device)
        targets = torch.full((_BATCH, cfg.MODEL.NUM_CLASSES), 1 / cfg.MODEL.NUM_CLASSES)
        targets = targets.to(device)
        seconds = []
        for _ in range(1 + _REPEATS):
            started = time.perf_counter() - core_wait_seconds()
            logits, maps = guided(images, imitate=True)
            terms = loss(logits, maps, targets, *guide(images), factor=1.0)
            terms["loss"].backward()
            synchronize(device)
            seconds.append(time.perf_counter() - core_wait_seconds() - started)
    return min(seconds[1:]) / _BATCH
