"""Data sets, loaders and mixing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from lg.augment.batched import BatchTestTransform, BatchTransform
from lg.augment.mixing import Mixing
from lg.augment.recipe import TestTransform, TrainTransform
from lg.datasets import build_dataset
from lg.datasets.base import (
    MISSING,
    DatasetSubset,
    ImageDataset,
    fingerprint,
    stratified_subset,
    tolerating,
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
from lg.datasets.scan import find_unreadable, leave_out, skip_message
from lg.distributed import World, in_turn
from lg.errors import ConfigError, DataError

_Value = TypeVar("_Value")


def build_train_data(cfg: CfgNode) -> ImageDataset:
    """The training set, or the part of it that TRAIN.FRACTION asks for; without images that cannot
    be read, where they are to be skipped."""
    return _ready(cfg, list_train_data(cfg), "TRAIN")


def build_test_data(cfg: CfgNode) -> ImageDataset:
    """The held-out set, likewise; its classes must be those of the training set."""
    return _ready(cfg, list_test_data(cfg), "TEST")


def fetch_data(cfg: CfgNode, world: World) -> tuple[ImageDataset, ImageDataset]:
    """Training and test set; only the main process downloads, the others wait for it."""
    with in_turn(world):
        train, test = list_train_data(cfg), list_test_data(cfg)
    check_same_classes(train, test)
    return _ready(cfg, train, "TRAIN"), _ready(cfg, test, "TEST")


def list_train_data(cfg: CfgNode) -> ImageDataset:
    """The training images as they are listed; none has been opened."""
    dataset = _listed(cfg, cfg.TRAIN.DATASET, cfg.TRAIN.SPLIT)
    return stratified_subset(dataset, cfg.TRAIN.FRACTION, cfg.RNG_SEED)


def list_test_data(cfg: CfgNode) -> ImageDataset:
    """The test images as they are listed; none has been opened."""
    return _listed(cfg, cfg.TEST.DATASET or cfg.TRAIN.DATASET, cfg.TEST.SPLIT)


def check_same_classes(train: ImageDataset, test: ImageDataset) -> None:
    """Finds a test set of other classes."""
    if train.class_names != test.class_names:
        raise DataError(
            f"TEST.DATASET {test.name} has other classes than TRAIN.DATASET {train.name}; "
            f"use the same set for both."
        )


def check_num_classes(cfg: CfgNode, dataset: ImageDataset, section: str) -> None:
    """Finds a set of another number of classes than the model's; `section` is TRAIN or TEST."""
    if dataset.num_classes != cfg.MODEL.NUM_CLASSES:
        raise ConfigError(
            f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, but {section}.DATASET {dataset.name} "
            f"has {dataset.num_classes} "
            f"classes: set it to {dataset.num_classes}."
        )


def check_batch_size(cfg: CfgNode, dataset: ImageDataset) -> None:
    """Finds a training set that does not fill a batch."""
    if len(dataset) < cfg.TRAIN.BATCH_SIZE:
        raise ConfigError(
            f"TRAIN.BATCH_SIZE is {cfg.TRAIN.BATCH_SIZE}, but there are only {len(dataset)} "
            f"training images; lower it "
            f"to {len(dataset)} or less."
        )


def build_train_loader(
    cfg: CfgNode, dataset: ImageDataset, world: World, device: torch.device
) -> TrainLoader | CachedTrainLoader:
    """Augmented training batches, this process's share."""
    recipe = _recipe(cfg)
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
        return CachedTrainLoader(cache, together, batches, device=_maker(device))
    return TrainLoader(
        TrainSamples(dataset, TrainTransform(**recipe), seed=cfg.RNG_SEED),
        batches,
        num_workers=cfg.DATA_LOADER.NUM_WORKERS,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY,
        timeout=cfg.DATA_LOADER.TIMEOUT,
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
        return CachedTestLoader(cache, together, device=_maker(device), **share)
    return test_loader(
        TestSamples(dataset, TestTransform(image_size=size)),
        num_workers=cfg.DATA_LOADER.NUM_WORKERS,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY,
        timeout=cfg.DATA_LOADER.TIMEOUT,
        **share,
    )


def kept_bytes(cfg: CfgNode, train: ImageDataset, test: ImageDataset) -> int:
    """What the decoded images of both sets take where they are kept."""
    return cache_bytes(train, BatchTransform(**_recipe(cfg)).prepare) + cache_bytes(
        test, BatchTestTransform(image_size=cfg.MODEL.IMG_SIZE).prepare
    )


def _recipe(cfg: CfgNode) -> dict[str, Any]:
    """What makes views of training images."""
    train = cfg.TRAIN
    strong, hflip = train.STRONG_AUGMENTATION, train.HFLIP
    return {"image_size": cfg.MODEL.IMG_SIZE, "strong": strong, "hflip": hflip}


def _build_cache(
    cfg: CfgNode, dataset: ImageDataset, prepare: Prepare, world: World, device: torch.device
) -> ImageCache | None:
    """A place for the decoded images, if they are to be kept; the main process decides for all."""
    if cfg.DATA_LOADER.BACKEND == "workers":
        return None
    place = _from_main(lambda: _choose_place(cfg, dataset, prepare, world, device))
    if place is None:
        return None
    return ImageCache(
        dataset,
        prepare,
        device=device if place == "device" else torch.device("cpu"),
        num_threads=usable_workers(cfg.DATA_LOADER.NUM_WORKERS),
        timeout=cfg.DATA_LOADER.TIMEOUT,
    )


def _choose_place(
    cfg: CfgNode, dataset: ImageDataset, prepare: Prepare, world: World, device: torch.device
) -> str | None:
    """`device`, or else `memory`; None where neither has room and none must."""
    needed, free = cache_bytes(dataset, prepare), free_memory(torch.device("cpu"))
    if device.type == "cuda" and needed <= free_memory(device) / 4:
        return "device"
    if needed * world.local_size > free / 4:  # half for training and test set together
        if cfg.DATA_LOADER.BACKEND == "auto":
            return None
        raise ConfigError(
            f"DATA_LOADER.BACKEND is device, but the images of {dataset.name}/{dataset.split} take "
            f"about {needed / 1e9:.1f} GB once they are decoded, in each of {world.local_size} "
            f"processes, and {free / 1e9:.1f} GB are free, of which a quarter may be used: set it "
            "to workers"
        )
    return "memory"


def _maker(device: torch.device) -> torch.device:
    """Where batches are made for a device: there, or on the CPU for one that lacks operations."""
    return device if device.type == "cuda" else torch.device("cpu")


def dataset_facts(dataset: ImageDataset) -> dict[str, Any]:
    """What a bank's provenance says of the data set."""
    count = len(dataset.full if isinstance(dataset, DatasetSubset) else dataset)
    facts = {"dataset": dataset.name, "split": dataset.split, "count": count}
    return facts | {"fingerprint": fingerprint(dataset)}


def build_mixing(cfg: CfgNode) -> Mixing:
    """Label smoothing, mixup and CutMix."""
    return Mixing(
        num_classes=cfg.MODEL.NUM_CLASSES,
        smoothing=cfg.TRAIN.LABEL_SMOOTHING,
        mixup_alpha=cfg.TRAIN.MIXUP_ALPHA,
        cutmix_alpha=cfg.TRAIN.CUTMIX_ALPHA,
    )


def _listed(cfg: CfgNode, name: str, split: str) -> ImageDataset:
    options = cfg.DATA_LOADER
    with tolerating(*([MISSING] if options.ON_ERROR == "skip" else [])):
        return build_dataset(name, options.ROOT, split, download=options.DOWNLOAD)


def _ready(cfg: CfgNode, dataset: ImageDataset, section: str) -> ImageDataset:
    """A set as it is trained on or tested, once it is seen to fit the config."""
    check_num_classes(cfg, dataset, section)
    if cfg.DATA_LOADER.ON_ERROR == "skip":
        threads = usable_workers(cfg.DATA_LOADER.NUM_WORKERS)
        unreadable = _from_main(lambda: find_unreadable(dataset, num_threads=threads))
        if unreadable and (not dist.is_initialized() or dist.get_rank() == 0):
            print(f"Warning: {skip_message(dataset, unreadable)}", file=sys.stderr, flush=True)
        dataset = leave_out(dataset, unreadable)
    if section == "TRAIN":
        check_batch_size(cfg, dataset)
    return dataset


def _from_main(make: Callable[[], _Value]) -> _Value:
    """What the main process makes, in every process."""
    if not dist.is_initialized():
        return make()
    values = [make() if dist.get_rank() == 0 else None]
    # NCCL sends from GPUs, and none has been chosen for this process yet.
    own = torch.device("cuda", dist.get_node_local_rank(dist.get_rank()))
    dist.broadcast_object_list(values, device=own if dist.get_backend() == "nccl" else None)
    return values[0]  # type: ignore[return-value]
