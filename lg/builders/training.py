"""The optimiser, its schedule, the device and the loop; and what they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from yacs.config import CfgNode

from lg.config import dump_config
from lg.device import Precision, allow_tf32, reuse_memory, select_device
from lg.distributed import World, in_turn
from lg.distributed.cluster import Resources
from lg.errors import ConfigError
from lg.guidance import GuidedStudent
from lg.guidance.bank_file import bank_path
from lg.models.backbone import Backbone
from lg.optim import LearningRate, WeightAverage, make_optimizer, parameter_groups
from lg.paths import is_local_file, is_url, local_path
from lg.run import Settings


def build_optimizer(cfg: CfgNode, guided: GuidedStudent) -> torch.optim.Optimizer:
    """The optimiser over student and projection heads; projection heads belong to the body."""
    heads = {f"student.{name}" for name in guided.student.head_names()}
    groups = parameter_groups(
        guided.named_parameters(),
        head_names=heads,
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
    """The learning rate of each epoch."""
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


def build_average(cfg: CfgNode, student: Backbone) -> WeightAverage | None:
    """The weight average of the student (not of the projection heads), if it is on."""
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
    """The device of this process; says how it may compute."""
    allow_tf32(cfg.TRAIN.TF32)
    if cfg.TRAIN.REUSE_MEMORY:
        reuse_memory()
    try:
        return select_device(cfg.DEVICE, local_rank=world.local_rank)
    except ValueError as error:  # what it refuses, it refuses for a value of the config
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
    """Full or mixed precision on a device."""
    try:
        return Precision(device, mixed=cfg.TRAIN.MIXED_PRECISION, dtype=cfg.TRAIN.AMP_DTYPE)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def build_settings(cfg: CfgNode) -> Settings:
    """The numbers of the training loop."""
    return Settings(
        max_epoch=cfg.OPTIM.MAX_EPOCH,
        warmup_epochs=cfg.OPTIM.WARMUP_EPOCHS,
        test_period=cfg.TEST.PERIOD,
        log_period=cfg.LOG_PERIOD,
        accum_steps=cfg.TRAIN.ACCUM_STEPS,
        clip_norm=cfg.OPTIM.CLIP_GRAD_NORM,
        seed=cfg.RNG_SEED,
        num_classes=cfg.MODEL.NUM_CLASSES,
        config_text=dump_config(cfg),
    )


def build_resources(cfg: CfgNode) -> Resources:
    """What a job on a cluster asks for."""
    return Resources(
        name=cfg.LAUNCH.NAME,
        num_processes=cfg.NUM_GPUS,
        max_per_node=cfg.MAX_GPUS_PER_NODE,
        on_gpus=cfg.DEVICE in ("auto", "cuda"),
        cpus=cfg.LAUNCH.CPUS_PER_GPU,
        memory_gb=cfg.LAUNCH.MEM_PER_GPU,
        minutes=cfg.LAUNCH.TIME_LIMIT,
        max_retries=cfg.LAUNCH.MAX_RETRY,
        partition=cfg.LAUNCH.PARTITION,
        gpu_type=cfg.LAUNCH.GPU_TYPE,
        comment=cfg.LAUNCH.COMMENT,
        email=cfg.LAUNCH.EMAIL,
    )


def fetch_weights(cfg: CfgNode, world: World) -> None:
    """Fetches the weights that training names by URL, once, so that all processes find them."""
    with in_turn(world):
        for _, path in _files_of_training(cfg):
            if path and is_url(path):
                local_path(path, cache=cfg.DOWNLOAD_CACHE)


def check_world(cfg: CfgNode, world: World) -> None:
    """Finds a batch that does not divide over the processes, whose number torchrun may have set."""
    shares = world.size * cfg.TRAIN.ACCUM_STEPS
    if cfg.TRAIN.BATCH_SIZE % shares:
        raise ConfigError(
            f"TRAIN.BATCH_SIZE is {cfg.TRAIN.BATCH_SIZE}; with {world.size} processes and "
            f"TRAIN.ACCUM_STEPS {cfg.TRAIN.ACCUM_STEPS} it must be a multiple of {shares}."
        )


def check_training(cfg: CfgNode, *, trained_guide: bool = True) -> None:
    """Finds, before anything is built, what training needs and the config does not give.

    Args:
        cfg: the config.
        trained_guide: whether a guide without weights is a fault.

    Raises:
        ConfigError: naming the key and the fix.
    """
    options = cfg.DISTILLATION
    if not cfg.TRAIN.DATASET:
        raise ConfigError("TRAIN.DATASET is ''; name the training set, such as digits or cifar100.")
    if cfg.MODEL.IN_CHANNELS != 3:
        raise ConfigError(
            f"MODEL.IN_CHANNELS is {cfg.MODEL.IN_CHANNELS}; the data sets give RGB images: set it "
            f"to 3."
        )
    guided = options.ENABLE_INTER or options.ENABLE_LOGIT
    if guided and trained_guide and not options.OFFLINE and options.TEACHER_WEIGHTS is None:
        raise ConfigError(
            "DISTILLATION.TEACHER_WEIGHTS is null; an untrained guide teaches noise. Train the "
            "guide first and name its "
            "model.pyth."
        )
    for key, path in _files_of_training(cfg):
        if path and not is_url(path) and not is_local_file(path):
            raise ConfigError(
                f"{key} is {path!r}, which does not exist. Check the path, or train the model that "
                "writes it first."
            )
    if options.OFFLINE and not bank_path(options.FEATURE_FILE).exists():
        raise ConfigError(
            f"DISTILLATION.FEATURE_FILE is {options.FEATURE_FILE!r}, which does not exist. Check "
            "the path, or compute the features with precompute_feature.py first."
        )


def _files_of_training(cfg: CfgNode) -> list[tuple[str, str | None]]:
    """(key, path or URL) of the files that training reads besides its images."""
    options = cfg.DISTILLATION
    files = [("TRAIN.WEIGHTS", cfg.TRAIN.WEIGHTS), ("MODEL.PRETRAINED", cfg.MODEL.PRETRAINED)]
    if (options.ENABLE_INTER or options.ENABLE_LOGIT) and not options.OFFLINE:
        files.append(("DISTILLATION.TEACHER_WEIGHTS", options.TEACHER_WEIGHTS))
    return files
