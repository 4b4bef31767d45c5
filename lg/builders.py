"""From the config to objects: the one place that translates keys into keyword arguments."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from lg.augment.batched import BatchTestTransform, BatchTransform
from lg.augment.mixing import Mixing
from lg.augment.recipe import TestTransform, TrainTransform
from lg.checkpoint import CheckpointError, foreign_weights, load_weights, read_checkpoint
from lg.config import ConfigError, dump_config
from lg.config_rules import FAMILIES
from lg.datasets import build_dataset
from lg.datasets.base import (
    DataError,
    DatasetSubset,
    ImageDataset,
    fingerprint,
    stratified_subset,
)
from lg.datasets.cache import ImageCache, Prepare, cache_bytes, free_memory
from lg.datasets.cached_loader import CachedTestLoader, CachedTrainLoader
from lg.datasets.loader import (
    Batch,
    TestSamples,
    TrainBatches,
    TrainLoader,
    TrainSamples,
    test_loader,
    usable_workers,
)
from lg.device import Precision, allow_tf32, select_device
from lg.distributed import World, barrier
from lg.guidance import FeatureBank, FrozenTeacher, GuidanceLoss, GuidedStudent, NoTeacher
from lg.info import describe, measure_model
from lg.models.backbone import Backbone
from lg.models.families import build_family, single
from lg.models.published import weights_hash
from lg.models.resnet import resnet
from lg.models.taps import map_shapes
from lg.models.timm_models import timm_model
from lg.optim import LearningRate, WeightAverage, make_optimizer, parameter_groups
from lg.paths import is_url
from lg.run import Settings

Guide = FrozenTeacher | FeatureBank | NoTeacher


def build_model(cfg: CfgNode, *, pretrained: bool = True) -> Backbone:
    """The student, or the CNN, alone: `model(images) -> logits`.

    Args:
        cfg: the config.
        pretrained: whether MODEL.PRETRAINED counts; not where other weights follow anyway.

    Raises:
        CheckpointError: MODEL.PRETRAINED cannot be read.
        ConfigError: sizes that do not fit together, or an unknown timm model.
    """
    try:
        return _build_by_type(cfg, pretrained=pretrained)
    except CheckpointError:
        raise
    except ValueError as error:  # what the models refuse, they refuse for a value of the config
        raise ConfigError(str(error)) from error
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:  # beyond all measure
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise ConfigError(
            f"MODEL.TYPE {cfg.MODEL.TYPE} cannot be built with these sizes ({reason}): lower those "
            "of MODEL, TRANSFORMER and the model's own section"
        ) from error


def _build_by_type(cfg: CfgNode, *, pretrained: bool) -> Backbone:
    kind = cfg.MODEL.TYPE
    sizes = _sizes(cfg, cfg.MODEL.IMG_SIZE)
    if kind == "ResNet":
        return _build_resnet(cfg, **sizes)
    if kind.startswith("timm/"):
        return timm_model(
            kind.removeprefix("timm/"),
            **sizes,
            drop_rate=single(kind, cfg.TRANSFORMER, "DROP_RATE"),
            drop_path_rate=cfg.TRANSFORMER.DROP_PATH_RATE
            and single(kind, cfg.TRANSFORMER, "DROP_PATH_RATE"),
            block_names=tuple(cfg.MODEL.BLOCKS),
            pretrained=_foreign_weights(cfg, cfg.MODEL.PRETRAINED) if pretrained else None,
        )
    section = FAMILIES[kind].section
    if kind == "DeiT":
        sizes["distilled"] = cfg.DISTILLATION.ENABLE_LOGIT
    return build_family(kind, cfg.TRANSFORMER, cfg[section] if section else {}, **sizes)


def build_guided(cfg: CfgNode) -> tuple[GuidedStudent, Guide, GuidanceLoss]:
    """The student with its projection heads, the guide or its stored maps, and the loss.

    Without guidance in the config: no heads, a guide that gives nothing, and plain cross-entropy. A
    guide whose TEACHER_WEIGHTS is null keeps its random weights, with a warning.
    """
    options = cfg.DISTILLATION
    student = build_model(cfg)
    if not (options.ENABLE_INTER or options.ENABLE_LOGIT):
        return GuidedStudent(student), NoTeacher(), GuidanceLoss()
    teacher = build_teacher(cfg, trained=not options.OFFLINE)
    student_taps, teacher_taps = _taps(cfg, student, teacher)
    guide: Guide
    if options.OFFLINE:
        guide = _open_bank(cfg, teacher)
    else:
        guide = FrozenTeacher(
            teacher,
            indices=teacher_taps,
            image_size=options.TEACHER_IMG_SIZE,
            batch_norm=options.TEACHER_BN,
            with_logits=options.ENABLE_LOGIT,
        )
    projected = guide.feature_dims if options.INTER_TRANSFORM == "linear" else []
    loss = GuidanceLoss(
        transform=options.INTER_TRANSFORM,
        inter_weight=options.INTER_WEIGHT,
        logit_kind=options.LOGIT_LOSS,
        temperature=options.LOGIT_TEMP,
        logit_weight=options.LOGIT_WEIGHT if options.ENABLE_LOGIT else 0.0,
    )
    return GuidedStudent(student, indices=student_taps, teacher_dims=projected), guide, loss


def build_teacher(cfg: CfgNode, *, trained: bool = True) -> Backbone:
    """The guide's model, with its trained weights or, where only its shape matters, without."""
    options = cfg.DISTILLATION
    sizes = _sizes(cfg, options.TEACHER_IMG_SIZE)
    path = options.TEACHER_WEIGHTS if trained else None
    foreign = None
    if path and options.TEACHER_MODEL != "ResNet" and not options.ENABLE_LOGIT:
        # Weights that timm publishes serve as well: maps are imitated, the classes do not matter.
        state = read_checkpoint(path, cache=cfg.DOWNLOAD_CACHE)
        foreign = None if "model_state" in state else foreign_weights(state, path)
    with torch.random.fork_rng(
        devices=[]
    ):  # a guided student starts from the same weights as a plain one
        if options.TEACHER_MODEL == "ResNet":
            teacher = _build_resnet(cfg, **sizes)
        else:
            name = options.TEACHER_MODEL.removeprefix("timm/")
            try:
                teacher = timm_model(name, **sizes, pretrained=foreign)
            except ValueError as error:
                raise ConfigError(
                    f"DISTILLATION.TEACHER_MODEL is {options.TEACHER_MODEL!r} at TEACHER_IMG_SIZE "
                    f"{options.TEACHER_IMG_SIZE}, which cannot be built: {error}"
                ) from error
    if path and foreign is None:
        load_weights(teacher, path, cache=cfg.DOWNLOAD_CACHE)
    elif trained and not path:
        warnings.warn(
            "DISTILLATION.TEACHER_WEIGHTS is null: the guide has random weights.", stacklevel=2
        )
    return teacher


def _open_bank(cfg: CfgNode, teacher: Backbone) -> FeatureBank:
    """The stored maps, held against the guide that they should come from."""
    options = cfg.DISTILLATION
    bank = FeatureBank(os.path.expanduser(options.FEATURE_FILE), options.INTER_TEACHER_INDEX)
    shapes = map_shapes(
        teacher,
        options.INTER_TEACHER_INDEX,
        image_size=options.TEACHER_IMG_SIZE,
        in_channels=cfg.MODEL.IN_CHANNELS,
    )
    weights = None
    if options.TEACHER_WEIGHTS and _is_at_hand(options.TEACHER_WEIGHTS):
        weights = weights_hash(build_teacher(cfg))
    bank.check(
        indices=bank.indices,
        shapes=shapes,
        guide=guide_name(cfg, options.TEACHER_MODEL),
        weights=weights,
        image_size=cfg.MODEL.IMG_SIZE,
        guide_image_size=options.TEACHER_IMG_SIZE,
    )
    return bank


def prepare_bank(cfg: CfgNode, guide: Guide, dataset: ImageDataset, device: torch.device) -> None:
    """Holds stored maps, if the guide is that, against the training set; puts them in place."""
    if not isinstance(guide, FeatureBank):
        return
    guide.check(indices=dataset.indices, shapes=guide.shapes, **dataset_facts(dataset))
    if cfg.DISTILLATION.FEATURE_PLACE == "device":
        guide.make_resident(device)


def dataset_facts(dataset: ImageDataset) -> dict[str, Any]:
    """What a bank's provenance says of the data set."""
    count = len(dataset.full if isinstance(dataset, DatasetSubset) else dataset)
    facts = {"dataset": dataset.name, "split": dataset.split, "count": count}
    return facts | {"fingerprint": fingerprint(dataset)}


def guide_name(cfg: CfgNode, kind: str) -> str:
    """A guide's type, of a ResNet with its depth."""
    return f"ResNet-{cfg.CNN.DEPTH}" if kind == "ResNet" else kind


def _is_at_hand(path: str) -> bool:
    return not is_url(path) and os.path.isfile(os.path.expanduser(path))


def _foreign_weights(cfg: CfgNode, path: str) -> dict[str, torch.Tensor] | None:
    """The weights in a file that timm or a model's makers published."""
    if not path:
        return None
    return foreign_weights(read_checkpoint(path, cache=cfg.DOWNLOAD_CACHE), path)


def build_train_data(cfg: CfgNode) -> ImageDataset:
    """The training set, or the part of it that TRAIN.FRACTION asks for."""
    dataset = _checked_dataset(cfg, "TRAIN", cfg.TRAIN.DATASET)
    dataset = stratified_subset(dataset, cfg.TRAIN.FRACTION, cfg.RNG_SEED)
    if len(dataset) < cfg.TRAIN.BATCH_SIZE:
        raise ConfigError(
            f"TRAIN.BATCH_SIZE is {cfg.TRAIN.BATCH_SIZE}, but there are only {len(dataset)} "
            f"training images; lower it "
            f"to {len(dataset)} or less."
        )
    return dataset


def build_test_data(cfg: CfgNode) -> ImageDataset:
    """The held-out set; its classes must be those of the training set."""
    return _checked_dataset(cfg, "TEST", cfg.TEST.DATASET or cfg.TRAIN.DATASET)


def fetch_data(cfg: CfgNode, world: World) -> tuple[ImageDataset, ImageDataset]:
    """Training and test set; only the main process downloads, the others wait for it."""
    if not world.is_main:
        barrier()
    data = build_train_data(cfg), build_test_data(cfg)
    if world.is_main:
        barrier()
    if data[0].class_names != data[1].class_names:
        raise DataError(
            f"TEST.DATASET {data[1].name} has other classes than TRAIN.DATASET {data[0].name}; "
            f"use the same set for both."
        )
    return data


def build_train_loader(
    cfg: CfgNode, dataset: ImageDataset, world: World, device: torch.device
) -> TrainLoader | CachedTrainLoader:
    """Augmented training batches, this process's share."""
    recipe = {
        "image_size": cfg.MODEL.IMG_SIZE,
        "strong": cfg.TRAIN.STRONG_AUGMENTATION,
        "hflip": cfg.TRAIN.HFLIP,
    }
    batches = TrainBatches(
        num_samples=len(dataset),
        batch_size=cfg.TRAIN.BATCH_SIZE,
        seed=cfg.RNG_SEED,
        max_epoch=cfg.OPTIM.MAX_EPOCH,
        rank=world.rank,
        world_size=world.size,
    )
    together = BatchTransform(**recipe)
    cache = _build_cache(cfg, dataset, together.prepare, world, device)
    if cache is not None:
        return CachedTrainLoader(cache, together, batches, device=device)
    return TrainLoader(
        TrainSamples(dataset, TrainTransform(**recipe), seed=cfg.RNG_SEED),
        batches,
        num_workers=cfg.DATA_LOADER.NUM_WORKERS,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY,
    )


def build_test_loader(
    cfg: CfgNode, dataset: ImageDataset, world: World, device: torch.device
) -> DataLoader[Batch] | CachedTestLoader:
    """Test batches, this process's share."""
    size = cfg.MODEL.IMG_SIZE
    share = {"batch_size": cfg.TEST.BATCH_SIZE, "rank": world.rank, "world_size": world.size}
    together = BatchTestTransform(image_size=size)
    cache = _build_cache(cfg, dataset, together.prepare, world, device)
    if cache is not None:
        return CachedTestLoader(cache, together, device=device, **share)
    return test_loader(
        TestSamples(dataset, TestTransform(image_size=size)),
        num_workers=cfg.DATA_LOADER.NUM_WORKERS,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY,
        **share,
    )


def _build_cache(
    cfg: CfgNode, dataset: ImageDataset, prepare: Prepare, world: World, device: torch.device
) -> ImageCache | None:
    """A place for the decoded images, if they are to be kept: the device, or else memory."""
    if cfg.DATA_LOADER.BACKEND == "workers":
        return None
    needed, memory = cache_bytes(dataset, prepare), torch.device("cpu")
    free, place = free_memory(memory), memory
    if device.type == "cuda" and needed <= free_memory(device) / 4:
        place = device
    elif needed * world.local_size > free / 4:  # half for training and test set together
        if cfg.DATA_LOADER.BACKEND == "auto":
            return None
        raise ConfigError(
            f"DATA_LOADER.BACKEND is device, but the images of {dataset.name}/{dataset.split} take "
            f"about {needed / 1e9:.1f} GB once they are decoded, in each of {world.local_size} "
            f"processes, and {free / 1e9:.1f} GB are free, of which a quarter may be used: set it "
            "to workers"
        )
    threads = usable_workers(cfg.DATA_LOADER.NUM_WORKERS)
    return ImageCache(dataset, prepare, device=place, num_threads=threads)


def build_mixing(cfg: CfgNode) -> Mixing:
    """Label smoothing, mixup and CutMix."""
    return Mixing(
        num_classes=cfg.MODEL.NUM_CLASSES,
        smoothing=cfg.TRAIN.LABEL_SMOOTHING,
        mixup_alpha=cfg.TRAIN.MIXUP_ALPHA,
        cutmix_alpha=cfg.TRAIN.CUTMIX_ALPHA,
    )


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
    try:
        return select_device(cfg.DEVICE, local_rank=world.local_rank)
    except ValueError as error:  # what it refuses, it refuses for a value of the config
        raise ConfigError(str(error)) from None


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
    keys = [("TRAIN.WEIGHTS", cfg.TRAIN.WEIGHTS), ("MODEL.PRETRAINED", cfg.MODEL.PRETRAINED)]
    if guided and options.OFFLINE:
        keys.append(("DISTILLATION.FEATURE_FILE", options.FEATURE_FILE))
    elif guided:
        keys.append(("DISTILLATION.TEACHER_WEIGHTS", options.TEACHER_WEIGHTS))
    for key, path in keys:
        if path and not is_url(path) and not _is_at_hand(path):
            first = (
                "compute the features with precompute_feature.py"
                if key == "DISTILLATION.FEATURE_FILE"
                else "train the model that writes it"
            )
            raise ConfigError(
                f"{key} is {path!r}, which does not exist. Check the path, or {first} first."
            )


def build_info(cfg: CfgNode) -> list[str]:
    """The lines of `--mode info`; needs no data and no weights."""
    model, options = cfg.MODEL, cfg.DISTILLATION
    channels = model.IN_CHANNELS
    student = build_model(cfg, pretrained=False)
    facts = measure_model(student, image_size=model.IMG_SIZE, in_channels=channels)
    if not (options.ENABLE_INTER or options.ENABLE_LOGIT):
        return describe(model.TYPE, facts, num_classes=model.NUM_CLASSES)
    teacher = build_teacher(cfg, trained=False)
    return describe(
        model.TYPE,
        facts,
        num_classes=model.NUM_CLASSES,
        guide_name=guide_name(cfg, options.TEACHER_MODEL),
        guide=measure_model(teacher, image_size=options.TEACHER_IMG_SIZE, in_channels=channels),
        taps=[*zip(*_taps(cfg, student, teacher), strict=True)],
        with_heads=options.ENABLE_INTER and options.INTER_TRANSFORM == "linear",
    )


def _taps(cfg: CfgNode, student: Backbone, teacher: Backbone) -> tuple[list[int], list[int]]:
    """The blocks of student and guide that are compared, in pairs."""
    options = cfg.DISTILLATION
    if not options.ENABLE_INTER:
        return [], []
    _check_taps("STUDENT", student, options.INTER_STUDENT_INDEX)
    _check_taps("TEACHER", teacher, options.INTER_TEACHER_INDEX)
    return options.INTER_STUDENT_INDEX, options.INTER_TEACHER_INDEX


def _check_taps(which: str, model: Backbone, indices: list[int]) -> None:
    count = len(model.blocks)
    if any(i >= count for i in indices):
        raise ConfigError(
            f"DISTILLATION.INTER_{which}_INDEX is {indices}; the {which.lower()} has {count} "
            f"blocks, numbered 0 to {count - 1}."
        )


def _build_resnet(cfg: CfgNode, **sizes: int) -> Backbone:
    return resnet(
        depth=cfg.CNN.DEPTH,
        **sizes,
        trans_fun=cfg.RESNET.TRANS_FUN,
        num_groups=cfg.RESNET.NUM_GROUPS,
        width_per_group=cfg.RESNET.WIDTH_PER_GROUP,
        stride_1x1=cfg.RESNET.STRIDE_1X1,
        activation=cfg.CNN.ACTIVATION_FUN,
        activation_inplace=cfg.CNN.ACTIVATION_INPLACE,
        bn_eps=cfg.CNN.BN_EPS,
        bn_momentum=cfg.CNN.BN_MOMENTUM,
        zero_init_final_bn_gamma=cfg.CNN.ZERO_INIT_FINAL_BN_GAMMA,
    )


def _sizes(cfg: CfgNode, img_size: int) -> dict[str, Any]:
    model = cfg.MODEL
    return dict(img_size=img_size, in_channels=model.IN_CHANNELS, num_classes=model.NUM_CLASSES)


def _checked_dataset(cfg: CfgNode, section: str, name: str) -> ImageDataset:
    """A set whose class count is the model's."""
    dataset = build_dataset(
        name, cfg.DATA_LOADER.ROOT, cfg[section].SPLIT, download=cfg.DATA_LOADER.DOWNLOAD
    )
    if dataset.num_classes != cfg.MODEL.NUM_CLASSES:
        raise ConfigError(
            f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, but {section}.DATASET {name} has "
            f"{dataset.num_classes} "
            f"classes: set it to {dataset.num_classes}."
        )
    return dataset
