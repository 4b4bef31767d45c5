"""Build the optimiser, its schedule, the device and the settings of the loop from the config."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from yacs.config import CfgNode

from lg.builders.splits import Splits, has_val_split
from lg.config import dump_config, is_guided
from lg.datasets.base import selection_hash
from lg.device import (
    Precision,
    allow_tf32,
    computes_in_bf16,
    make_deterministic,
    reuse_memory,
    select_device,
)
from lg.distributed import World, in_turn
from lg.errors import ConfigError
from lg.guidance import GuidanceSchedule, GuidedStudent
from lg.guidance.bank_file import bank_path
from lg.models.backbone import Backbone
from lg.optim import LearningRate, WeightAverage, make_optimizer, parameter_groups
from lg.paths import is_local_file, is_url, local_path
from lg.run import Settings

# File that training reads -> what to do if it does not exist.
_IF_MISSING = {
    "TRAIN.WEIGHTS": "train the model that writes it first",
    "MODEL.PRETRAINED": "download the weights first",
    "DISTILLATION.TEACHER_WEIGHTS": "train the model that writes it first (--mode pipeline trains "
    "guide and student)",
}


def build_optimizer(cfg: CfgNode, guided: GuidedStudent) -> torch.optim.Optimizer:
    """Build the optimiser of student and projection heads.

    Projection heads get the learning rate of the body, not that of the classifier.
    """
    student = guided.student
    # Models of timm list parameters that are not decayed.
    listed: set[str] = getattr(student.net, "no_weight_decay", set)()
    groups = parameter_groups(
        guided.named_parameters(),
        head_names={f"student.{name}" for name in student.head_names()},
        no_decay={f"student.net.{name}" for name in listed},
        weight_decay=cfg.OPTIM.WEIGHT_DECAY,
        head_lr_ratio=cfg.OPTIM.HEAD_LR_RATIO,
    )
    return make_optimizer(
        groups,
        kind=cfg.OPTIM.OPTIMIZER,
        lr=cfg.OPTIM.BASE_LR,
        momentum=cfg.OPTIM.MOMENTUM,
        dampening=cfg.OPTIM.DAMPENING,
        nesterov=cfg.OPTIM.NESTEROV,
        betas=(cfg.OPTIM.BETA1, cfg.OPTIM.BETA2),
    )


def build_learning_rate(cfg: CfgNode) -> LearningRate:
    """Build the schedule of the learning rate."""
    return LearningRate(
        policy=cfg.OPTIM.LR_POLICY,
        base_lr=cfg.OPTIM.BASE_LR,
        max_epoch=cfg.OPTIM.MAX_EPOCH,
        min_lr=cfg.OPTIM.MIN_LR,
        steps=cfg.OPTIM.STEPS,
        lr_mult=cfg.OPTIM.LR_MULT,
        warmup_factor=cfg.OPTIM.WARMUP_FACTOR,
        warmup_epochs=cfg.OPTIM.WARMUP_EPOCHS,
    )


def build_schedule(cfg: CfgNode) -> GuidanceSchedule:
    """Build the schedule of guidance; without guidance, it is static."""
    options = cfg.DISTILLATION
    if not is_guided(cfg):
        return GuidanceSchedule()
    return GuidanceSchedule(
        options.SCHEDULE,
        epoch=options.SCHEDULE_EPOCH,
        max_epoch=cfg.OPTIM.MAX_EPOCH,
        window=options.ADAPTIVE_WINDOW,
        threshold=options.ADAPTIVE_THRESHOLD,
    )


def build_average(cfg: CfgNode, student: Backbone) -> WeightAverage | None:
    """Build the weight average of the student, without projection heads; None if it is off."""
    if cfg.OPTIM.EMA_UPDATE_PERIOD == 0:
        return None
    return WeightAverage(
        student,
        alpha=cfg.OPTIM.EMA_ALPHA,
        period=cfg.OPTIM.EMA_UPDATE_PERIOD,
        batch_size=cfg.TRAIN.BATCH_SIZE,
        max_epoch=cfg.OPTIM.MAX_EPOCH,
    )


def build_device(cfg: CfgNode, world: World) -> torch.device:
    """Select the device of this process; set TF32, determinism and how freed memory is used.

    Raises:
        ConfigError: The device is not available.
    """
    allow_tf32(cfg.TRAIN.TF32)
    make_deterministic(cfg.TRAIN.DETERMINISTIC)
    if cfg.TRAIN.REUSE_MEMORY:
        reuse_memory()
    try:
        return select_device(cfg.DEVICE, local_rank=world.local_rank)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def synchronize_batch_norms(
    cfg: CfgNode, parts: Sequence[object], world: World, device: torch.device
) -> None:
    """With TRAIN.SYNC_BN, make BatchNorms of student and guide use the whole batch, in place.

    Names, parameters and stored statistics stay as they are.

    Raises:
        ConfigError: No BatchNorm uses the statistics of the batch, or the device is not a GPU.
    """
    if not cfg.TRAIN.SYNC_BN:
        return
    models = [part for part in parts if isinstance(part, nn.Module) and _uses_batch_stats(part)]
    if not models:
        raise ConfigError(
            f"TRAIN.SYNC_BN is True, but no BatchNorm of MODEL.TYPE {cfg.MODEL.TYPE} or its guide "
            "uses the statistics of the batch: set it to False."
        )
    if device.type != "cuda":
        raise ConfigError(
            f"TRAIN.SYNC_BN is True, but torch synchronises BatchNorm on GPUs only and this run is "
            f"on {device.type}: set it to False."
        )
    if world.size > 1:
        for model in models:
            convert_sync_batchnorm(model)  # torch's, and timm's BatchNorm keeps its activation


def _uses_batch_stats(model: nn.Module) -> bool:
    return any(isinstance(each, _BatchNorm) and each.training for each in model.modules())


def build_precision(cfg: CfgNode, device: torch.device) -> Precision:
    """Build full or mixed precision.

    Raises:
        ConfigError: The device does not support TRAIN.AMP_DTYPE.
    """
    try:
        return Precision(device, mixed=cfg.TRAIN.MIXED_PRECISION, dtype=cfg.TRAIN.AMP_DTYPE)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def precision_note(cfg: CfgNode, precision: Precision) -> str:
    """Return why TRAIN.MIXED_PRECISION has no effect here; empty if it has."""
    if not cfg.TRAIN.MIXED_PRECISION or precision.dtype is not None:
        return ""
    return (
        "TRAIN.MIXED_PRECISION is True, but this CPU only emulates bf16, which is slower than "
        "fp32: training in fp32 (set TRAIN.AMP_DTYPE bf16 to use bf16 anyway)."
    )


def precision_hint(cfg: CfgNode, precision: Precision) -> str:
    """Return a hint if this CPU trains faster in mixed precision; empty if not."""
    on_cpu = precision.device.type == "cpu"
    if cfg.TRAIN.MIXED_PRECISION or not on_cpu or not computes_in_bf16(precision.device):
        return ""
    return "This CPU computes in bf16: TRAIN.MIXED_PRECISION True trains 1.5 to 2 times as fast."


def patch_drop_note(cfg: CfgNode, student: Backbone) -> str:
    """Return how many patches TRAIN.PATCH_DROP keeps; empty if it is off."""
    if cfg.TRAIN.PATCH_DROP == 0:
        return ""
    count = math.prod(student.layouts[0].size)
    kept = max(1, int(count * (1 - cfg.TRAIN.PATCH_DROP)))
    return f"TRAIN.PATCH_DROP: training keeps {kept} of {count} patches of each image."


def build_settings(cfg: CfgNode, data: Splits) -> Settings:
    """Build the settings of the training loop on these images."""
    chosen_on = "validation" if has_val_split(cfg) else "test"
    sets = {"training": data.train, chosen_on: data.test}
    if data.final is not None:
        sets["test"] = data.final
    return Settings(
        max_epoch=cfg.OPTIM.MAX_EPOCH,
        warmup_epochs=cfg.OPTIM.WARMUP_EPOCHS,
        test_period=cfg.TEST.PERIOD,
        early_stop=cfg.TRAIN.EARLY_STOP,
        log_period=cfg.LOG_PERIOD,
        accum_steps=cfg.TRAIN.ACCUM_STEPS,
        clip_norm=cfg.OPTIM.CLIP_GRAD_NORM,
        seed=cfg.RNG_SEED,
        num_classes=cfg.MODEL.NUM_CLASSES,
        config_text=dump_config(cfg),
        class_names=list(data.train.class_names),
        images={name: selection_hash(dataset) for name, dataset in sets.items()},
    )


def build_resources(cfg: CfgNode) -> dict[str, Any]:
    """Build the resources that a cluster job requests, under submitit's names."""
    launch, on_gpus = cfg.LAUNCH, cfg.DEVICE in ("auto", "cuda")
    per_node = min(cfg.NUM_GPUS, cfg.MAX_GPUS_PER_NODE)
    resources: dict[str, Any] = {
        "name": launch.NAME,
        "nodes": cfg.NUM_GPUS // per_node,
        "tasks_per_node": per_node,
        "cpus_per_task": launch.CPUS_PER_GPU,
        "mem_gb": launch.MEM_PER_GPU * per_node,
        "timeout_min": launch.TIME_LIMIT,
        "slurm_partition": launch.PARTITION,
    }
    if on_gpus:
        resources["gpus_per_node"] = per_node
    if on_gpus and launch.GPU_TYPE:
        resources["slurm_constraint"] = launch.GPU_TYPE
    if launch.COMMENT:
        resources["slurm_comment"] = launch.COMMENT
    if launch.EMAIL:
        resources["slurm_additional_parameters"] = {"mail-user": launch.EMAIL, "mail-type": "END"}
    return resources


def fetch_weights(cfg: CfgNode, world: World) -> None:
    """Download weights given by URL once for all processes."""
    with in_turn(world):
        for _, path in _files_of_training(cfg):
            if path and is_url(path):
                local_path(path, cache=cfg.DOWNLOAD_CACHE)


def check_world(cfg: CfgNode, world: World) -> None:
    """Check that the batch, and pairs to mix, divide over the processes; torchrun may have set
    their number.

    Raises:
        ConfigError: It does not.
    """
    shares = world.size * cfg.TRAIN.ACCUM_STEPS
    if cfg.TRAIN.BATCH_SIZE % shares:
        raise ConfigError(
            f"TRAIN.BATCH_SIZE is {cfg.TRAIN.BATCH_SIZE}; with {world.size} processes and "
            f"TRAIN.ACCUM_STEPS {cfg.TRAIN.ACCUM_STEPS} it must be a multiple of {shares}."
        )
    mixed = cfg.TRAIN.MIXUP_ALPHA > 0 or cfg.TRAIN.CUTMIX_ALPHA > 0
    if mixed and world.size > 1 and cfg.TRAIN.BATCH_SIZE % (2 * world.size):
        raise ConfigError(
            f"TRAIN.BATCH_SIZE is {cfg.TRAIN.BATCH_SIZE}; mixup and CutMix mix pairs of images, so "
            f"with {world.size} processes it must be a multiple of {2 * world.size}."
        )


def check_training(cfg: CfgNode, *, trained_guide: bool = True) -> None:
    """Check, before anything is built, that the config gives everything that training needs.

    Args:
        cfg: The config.
        trained_guide: Whether a guide must have weights.

    Raises:
        ConfigError: Something is missing; names the key and the fix.
    """
    options = cfg.DISTILLATION
    if cfg.LOG_TRACKER != "none" and importlib.util.find_spec(cfg.LOG_TRACKER) is None:
        raise ConfigError(
            f"LOG_TRACKER is {cfg.LOG_TRACKER}, which is not installed: pip install -e "
            f"'.[{cfg.LOG_TRACKER}]', or set it to none."
        )
    if not cfg.TRAIN.DATASET:
        raise ConfigError("TRAIN.DATASET is '': set it to a data set, such as digits or cifar100.")
    if cfg.MODEL.IN_CHANNELS not in (1, 3):
        raise ConfigError(
            f"MODEL.IN_CHANNELS is {cfg.MODEL.IN_CHANNELS}, but images are RGB or gray: set it to "
            "3 or 1."
        )
    if is_guided(cfg) and trained_guide and not options.OFFLINE and options.TEACHER_WEIGHTS is None:
        raise ConfigError(
            "DISTILLATION.TEACHER_WEIGHTS is null, but the guide must be trained: train it first "
            "and set this to its model.pyth."
        )
    for key, path in _files_of_training(cfg):
        if path and not is_url(path) and not is_local_file(path):
            advice = _IF_MISSING[key]
            if key == "DISTILLATION.TEACHER_WEIGHTS" and not trained_guide:
                advice = "set it to null for a guide with random weights"
            raise ConfigError(
                f"{key} is {path!r}, which does not exist. Check the path, or {advice}."
            )
    if options.OFFLINE and not (place := bank_path(options.FEATURE_FILE)).exists():
        raise ConfigError(
            f"DISTILLATION.FEATURE_FILE is {options.FEATURE_FILE!r}, but {place} does not exist. "
            "Check the path, or compute the features with precompute_feature.py first."
        )


def _files_of_training(cfg: CfgNode) -> list[tuple[str, str | None]]:
    """Return (key, path or URL) of the files that training reads besides images."""
    options = cfg.DISTILLATION
    files = [("TRAIN.WEIGHTS", cfg.TRAIN.WEIGHTS), ("MODEL.PRETRAINED", cfg.MODEL.PRETRAINED)]
    if is_guided(cfg) and not options.OFFLINE:
        files.append(("DISTILLATION.TEACHER_WEIGHTS", options.TEACHER_WEIGHTS))
    return files
