"""Data sets, loaders and mixing."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from lg.augment.batched import BatchTestTransform, BatchTransform
from lg.augment.mixing import Mixing
from lg.augment.recipe import TestTransform, TrainTransform
from lg.config import ConfigError
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
from lg.distributed import World, barrier


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
        return CachedTrainLoader(cache, together, batches, device=_maker(device))
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
        return CachedTestLoader(cache, together, device=_maker(device), **share)
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
