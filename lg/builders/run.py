"""Builds a whole training run from the config."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from lg.builders.compiling import compile_student, limit_compile_workers
from lg.builders.data import (
    build_class_weights,
    build_mixing,
    build_test_loader,
    build_train_loader,
)
from lg.builders.guides import Guide, check_guide_classes, guide_notes, prepare_bank
from lg.builders.models import build_guided
from lg.builders.preprocessing import build_preprocessing, range_note, with_data_statistics
from lg.builders.splits import Splits, data_notes, exclusion_line
from lg.builders.training import (
    build_average,
    build_device,
    build_learning_rate,
    build_optimizer,
    build_precision,
    build_schedule,
    build_settings,
    patch_drop_note,
    precision_hint,
    precision_note,
    synchronize_batch_norms,
)
from lg.checkpoint import CheckpointFolder, load_weights
from lg.config.defaults import flatten
from lg.config.published import published_curve
from lg.datasets.loader import MODEL
from lg.device import Precision
from lg.distributed import World
from lg.errors import first_few
from lg.guidance import GuidedStudent
from lg.logs.log import RunLog
from lg.logs.pictures import Pictures
from lg.logs.reporter import Reporter
from lg.logs.tracker import Tracker
from lg.models.layers import fuse_attention, gains_from_channels_last
from lg.run import Run


def build_run(cfg: CfgNode, data: Splits, world: World, log: RunLog) -> Run:
    """Build all parts of a run on its device, and seed the random streams."""
    cfg = with_data_statistics(cfg, data.train)
    device = build_device(cfg, world)
    _prepare_log(cfg, data, device, log)
    torch.backends.cudnn.benchmark = cfg.CUDNN.BENCHMARK
    torch.manual_seed(cfg.RNG_SEED)  # the same initial weights in every process
    guided, guide, loss = build_guided(cfg)
    check_guide_classes(cfg, data.train.class_names)
    for note in guide_notes(cfg):
        log.warn(f"{note}.")
    if cfg.TRAIN.WEIGHTS:
        _start_from(cfg, guided.student, data.train.class_names, log)
    stream = np.random.SeedSequence((cfg.RNG_SEED, MODEL, world.rank)).generate_state(1)[0]
    torch.manual_seed(int(stream))  # other draws of dropout in each process
    prepare_bank(cfg, guide, data.train, device)
    precision = build_precision(cfg, device)
    guided.to(device)
    for note in (
        place_model(guided.student, precision),
        precision_hint(cfg, precision),
        patch_drop_note(cfg, guided.student),
    ):
        if note:
            log.info(note)
    if isinstance(guide, nn.Module):
        place_model(guide, precision)
    synchronize_batch_norms(cfg, (guided, guide), world, device)
    if note := precision_note(cfg, precision):
        log.warn(note)
    module, called_guide = _wrap(cfg, guided, guide, world, device, precision, log)
    loader = build_train_loader(cfg, data.train, world, device)
    log.info(f"DATA_LOADER.BACKEND {cfg.DATA_LOADER.BACKEND}: {loader}.")
    return Run(
        guided=guided,
        module=module,
        guide=called_guide,
        loss=replace(loss, class_weights=build_class_weights(cfg, data.train, device)),
        schedule=build_schedule(cfg),
        mixing=build_mixing(cfg),
        optimizer=build_optimizer(cfg, guided),
        learning_rate=build_learning_rate(cfg),
        average=build_average(cfg, guided.student),
        precision=precision,
        loader=loader,
        test_loader=build_test_loader(cfg, data.test, world, device),
        final_loader=build_test_loader(cfg, data.final, world, device) if data.final else None,
        device=device,
        world=world,
        log=log,
        report=_build_report(cfg, data, log, device, loader.steps_per_epoch),
        checkpoints=CheckpointFolder(cfg.OUT_DIR, keep=cfg.TRAIN.KEEP_CHECKPOINTS),
        settings=build_settings(cfg, data),
    )


def _build_report(
    cfg: CfgNode, data: Splits, log: RunLog, device: torch.device, steps_per_epoch: int
) -> Reporter:
    return Reporter(
        log=log,
        pictures=Pictures(
            log,
            data.train.class_names,
            preprocessing=build_preprocessing(cfg, training=True),
            enabled=cfg.LOG_PICTURES,
        ),
        device=device,
        split=str(data.test),
        final_split=str(data.final or ""),
        published=published_curve(cfg),
        steps_per_epoch=steps_per_epoch,
        max_epoch=cfg.OPTIM.MAX_EPOCH,
        batch_size=cfg.TRAIN.BATCH_SIZE,
        num_classes=cfg.MODEL.NUM_CLASSES,
        inter=cfg.DISTILLATION.ENABLE_INTER,
        logit=cfg.DISTILLATION.ENABLE_LOGIT,
    )


def place_model(net: nn.Module, precision: Precision) -> str:
    """Move a model to its device, in the fastest memory format and form of attention.

    Returns:
        A note on the choice; empty if nothing was chosen.
    """
    net.to(precision.device)
    if precision.device.type != "cpu":
        return ""
    fuse_attention(net, precision.dtype is None)
    if not gains_from_channels_last(net):
        return ""
    net.to(memory_format=torch.channels_last)
    return "Memory format: channels_last, which is faster for this model on CPUs."


def _start_from(cfg: CfgNode, student: nn.Module, class_names: Sequence[str], log: RunLog) -> None:
    """Load TRAIN.WEIGHTS, which may be of another image size."""
    facts = load_weights(student, cfg.TRAIN.WEIGHTS, cache=cfg.DOWNLOAD_CACHE, any_size=True)
    for key, (old, new) in facts["resampled"].items():
        log.info(f"TRAIN.WEIGHTS: {key} resampled from {old} to {new}.")
    theirs = facts.get("class_names")
    if theirs is not None and theirs != list(class_names):
        log.warn(
            f"TRAIN.WEIGHTS was trained on the classes {first_few(theirs)}, not on "
            f"{first_few(class_names)}: its classifier starts with scores of other classes."
        )


def _prepare_log(cfg: CfgNode, data: Splits, device: torch.device, log: RunLog) -> None:
    """Set the tracker, and log what may not be intended about device and images."""
    if cfg.LOG_TRACKER != "none" and log.enabled:
        log.tracker = Tracker(cfg.LOG_TRACKER, cfg.OUT_DIR, dict(flatten(cfg)), log.warn)
    if device.type == "cpu" and cfg.DEVICE == "auto":
        log.warn("No GPU found: running on the CPU (set DEVICE cpu to silence this).")
    if cfg.MODEL.NUM_CLASSES == 1:
        log.warn("MODEL.NUM_CLASSES is 1: labels carry no information, and every test gives 100 %.")
    if line := exclusion_line(cfg, data.train):
        log.info(line)
    if note := range_note(build_preprocessing(cfg, training=True)):
        log.warn(note)
    for note in data_notes(*data):
        log.warn(f"{note}.")


def _wrap(
    cfg: CfgNode,
    guided: GuidedStudent,
    guide: Guide,
    world: World,
    device: torch.device,
    precision: Precision,
    log: RunLog,
) -> tuple[nn.Module, Any]:
    """Compile student and guide and average gradients over processes, where the config sets that.

    Returns:
        What the training step calls: the module that computes the student, and the guide.
    """
    module: nn.Module = guided
    called: Any = guide
    if cfg.TRAIN.COMPILE != "none":
        count = cfg.TRAIN.BATCH_SIZE // (world.size * cfg.TRAIN.ACCUM_STEPS)
        limit_compile_workers(world.local_size)
        module, called = compile_student(
            guided,
            guide,
            cfg.TRAIN.COMPILE,
            example=torch.zeros(
                count, cfg.MODEL.IN_CHANNELS, *[cfg.MODEL.IMG_SIZE] * 2, device=device
            ),
            precision=precision,
            ends=build_schedule(cfg).may_end,
            info=log.info,
            warn=log.warn,
        )
    if world.size > 1:
        # The warning is about 1x1 convolutions and single tokens, whose layout costs nothing here.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        devices = [device.index] if device.type == "cuda" else None
        module = DistributedDataParallel(module, device_ids=devices)
        # Buffers are constant, or each process's own until it tests (see test_epoch). Set here
        # because newer versions of torch renamed the argument.
        module.broadcast_buffers = False
    return module, called
