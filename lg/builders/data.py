"""Build data sets, loaders and mixing from the config."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from lg.augment.batched import BatchTestTransform, BatchTransform
from lg.augment.mixing import Mixing
from lg.augment.recipe import TestTransform, TrainTransform
from lg.datasets import build_dataset
from lg.datasets.base import MISSING, ImageDataset, fingerprint, stratified_subset
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
from lg.datasets.scan import drop_unreadable, find_unreadable, skip_message
from lg.distributed import World, in_turn
from lg.errors import ConfigError, DataError

_Value = TypeVar("_Value")


def build_train_data(cfg: CfgNode) -> ImageDataset:
    """Build the training set: the part that TRAIN.FRACTION selects, without unreadable images if
    they are to be skipped."""
    return _prepare(cfg, list_train_data(cfg), "TRAIN")


def build_test_data(cfg: CfgNode) -> ImageDataset:
    """Build the test set, without unreadable images if they are to be skipped."""
    return _prepare(cfg, list_test_data(cfg), "TEST")


def fetch_data(cfg: CfgNode, world: World) -> tuple[ImageDataset, ImageDataset]:
    """Build the training and the test set; only the main process downloads, the others wait."""
    with in_turn(world):
        train, test = list_train_data(cfg), list_test_data(cfg)
    check_same_classes(train, test)
    return _prepare(cfg, train, "TRAIN"), _prepare(cfg, test, "TEST")


def list_train_data(cfg: CfgNode, tolerate: Iterable[str] = ()) -> ImageDataset:
    """List the training images without opening them; see `build_dataset` for `tolerate`."""
    dataset = _list(cfg, cfg.TRAIN.DATASET, cfg.TRAIN.SPLIT, tolerate)
    return stratified_subset(dataset, cfg.TRAIN.FRACTION, cfg.RNG_SEED)


def list_test_data(cfg: CfgNode, tolerate: Iterable[str] = ()) -> ImageDataset:
    """List the test images without opening them; see `build_dataset` for `tolerate`."""
    return _list(cfg, cfg.TEST.DATASET or cfg.TRAIN.DATASET, cfg.TEST.SPLIT, tolerate)


def check_same_classes(train: ImageDataset, test: ImageDataset) -> None:
    """Reject a test set whose classes differ from those of the training set."""
    if train.class_names != test.class_names:
        raise DataError(
            f"TEST.DATASET {test.name} has other classes than TRAIN.DATASET {train.name}; "
            f"use the same set for both."
        )


def check_num_classes(cfg: CfgNode, dataset: ImageDataset, section: str) -> None:
    """Reject a set whose number of classes differs from the model's; `section` is TRAIN or TEST."""
    if dataset.num_classes != cfg.MODEL.NUM_CLASSES:
        raise ConfigError(
            f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, but {section}.DATASET {dataset.name} "
            f"has {dataset.num_classes} classes: set it to {dataset.num_classes}."
        )


def check_batch_size(cfg: CfgNode, dataset: ImageDataset) -> None:
    """Reject a training set that is smaller than a batch."""
    if len(dataset) < cfg.TRAIN.BATCH_SIZE:
        raise ConfigError(
            f"TRAIN.BATCH_SIZE is {cfg.TRAIN.BATCH_SIZE}, but there are only {len(dataset)} "
            f"training images; lower it to {len(dataset)} or less."
        )


def build_train_loader(
    cfg: CfgNode, dataset: ImageDataset, world: World, device: torch.device
) -> TrainLoader | CachedTrainLoader:
    """Build the loader of this process's share of augmented training batches."""
    recipe = _recipe(cfg)
    batches = TrainBatches(
        num_samples=len(dataset),
        batch_size=cfg.TRAIN.BATCH_SIZE,
        seed=cfg.RNG_SEED,
        max_epoch=cfg.OPTIM.MAX_EPOCH,
        rank=world.rank,
        world_size=world.size,
    )
    batch_transform = BatchTransform(**recipe)
    cache = _build_cache(cfg, dataset, batch_transform.prepare, world, device)
    if cache is not None:
        return CachedTrainLoader(
            cache, batch_transform, batches, device=_augmentation_device(device)
        )
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
    """Build the loader of this process's share of test batches."""
    size = cfg.MODEL.IMG_SIZE
    share = {"batch_size": cfg.TEST.BATCH_SIZE, "rank": world.rank, "world_size": world.size}
    batch_transform = BatchTestTransform(image_size=size)
    cache = _build_cache(cfg, dataset, batch_transform.prepare, world, device)
    if cache is not None:
        return CachedTestLoader(
            cache, batch_transform, device=_augmentation_device(device), **share
        )
    return test_loader(
        TestSamples(dataset, TestTransform(image_size=size)),
        num_workers=cfg.DATA_LOADER.NUM_WORKERS,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY,
        timeout=cfg.DATA_LOADER.TIMEOUT,
        **share,
    )


def _recipe(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of the training transforms."""
    train = cfg.TRAIN
    strong, hflip = train.STRONG_AUGMENTATION, train.HFLIP
    return {"image_size": cfg.MODEL.IMG_SIZE, "strong": strong, "hflip": hflip}


def _build_cache(
    cfg: CfgNode, dataset: ImageDataset, prepare: Prepare, world: World, device: torch.device
) -> ImageCache | None:
    """Build a cache of decoded images, or return None if they do not stay in memory.

    The main process decides for all processes.
    """
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
    """Return `device` or else `memory`; None if neither has room and BACKEND is auto."""
    needed, free = cache_bytes(dataset, prepare), free_memory(torch.device("cpu"))
    if device.type == "cuda" and needed <= free_memory(device) / 4:
        return "device"
    if needed * world.local_size > free / 4:  # so at most half for training and test set together
        if cfg.DATA_LOADER.BACKEND == "auto":
            return None
        raise ConfigError(
            f"DATA_LOADER.BACKEND is device, but the images of {dataset.name}/{dataset.split} take "
            f"about {needed / 1e9:.1f} GB once decoded, in each of {world.local_size} processes, "
            f"and at most a quarter of the {free / 1e9:.1f} GB of free memory may be used: set it "
            "to workers"
        )
    return "memory"


def _augmentation_device(device: torch.device) -> torch.device:
    """Return where batches are augmented: on a GPU, else on the CPU (MPS lacks operations)."""
    return device if device.type == "cuda" else torch.device("cpu")


def dataset_facts(dataset: ImageDataset) -> dict[str, Any]:
    """Return what the provenance of a feature bank records of the data set."""
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "count": len(dataset.full),
        "fingerprint": fingerprint(dataset),
    }


def build_mixing(cfg: CfgNode) -> Mixing:
    """Build label smoothing, mixup and CutMix."""
    return Mixing(
        num_classes=cfg.MODEL.NUM_CLASSES,
        smoothing=cfg.TRAIN.LABEL_SMOOTHING,
        mixup_alpha=cfg.TRAIN.MIXUP_ALPHA,
        cutmix_alpha=cfg.TRAIN.CUTMIX_ALPHA,
    )


def _list(cfg: CfgNode, name: str, split: str, tolerate: Iterable[str]) -> ImageDataset:
    options = cfg.DATA_LOADER
    if options.ON_ERROR == "skip":
        tolerate = {MISSING, *tolerate}
    return build_dataset(name, options.ROOT, split, download=options.DOWNLOAD, tolerate=tolerate)


def _prepare(cfg: CfgNode, dataset: ImageDataset, section: str) -> ImageDataset:
    """Check that a set fits the config, and drop unreadable images if they are to be skipped."""
    check_num_classes(cfg, dataset, section)
    if cfg.DATA_LOADER.ON_ERROR == "skip":
        threads = usable_workers(cfg.DATA_LOADER.NUM_WORKERS)
        unreadable = _from_main(lambda: find_unreadable(dataset, num_threads=threads))
        if unreadable and (not dist.is_initialized() or dist.get_rank() == 0):
            print(f"Warning: {skip_message(dataset, unreadable)}", file=sys.stderr, flush=True)
        dataset = drop_unreadable(dataset, unreadable)
    if section == "TRAIN":
        check_batch_size(cfg, dataset)
    return dataset


def _from_main(make: Callable[[], _Value]) -> _Value:
    """Call `make` in the main process and return its result in every process."""
    if not dist.is_initialized():
        return make()
    values = [make() if dist.get_rank() == 0 else None]
    # NCCL sends from GPUs, and no GPU is selected for this process yet.
    own = torch.device("cuda", dist.get_node_local_rank(dist.get_rank()))
    dist.broadcast_object_list(values, device=own if dist.get_backend() == "nccl" else None)
    return values[0]  # type: ignore[return-value]
