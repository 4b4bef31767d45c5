"""Build data sets, loaders and mixing from the config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from lg.augment.batched import BatchTestTransform, BatchTransform
from lg.augment.mixing import Mixing
from lg.builders.preprocessing import build_preprocessing
from lg.builders.splits import (
    Splits,
    check_validation,
    has_test_split,
    has_val_split,
    list_split,
    list_test_data,
    list_train_data,
    list_val_data,
)
from lg.datasets.base import ImageDataset, class_weights, fingerprint
from lg.datasets.cache import ImageCache, Prepare, cache_bytes
from lg.datasets.cached_loader import CachedTestLoader, CachedTrainLoader, TestLoader
from lg.datasets.loader import (
    Samples,
    TrainBatches,
    TrainLoader,
    test_loader,
    usable_workers,
)
from lg.datasets.scan import drop_unreadable, find_unreadable
from lg.device import free_memory
from lg.distributed import World, from_main, in_turn
from lg.errors import ConfigError, DataError


def build_train_data(cfg: CfgNode) -> ImageDataset:
    """Build the training set: the part that TRAIN.FRACTION selects and TRAIN.VAL_FRACTION leaves,
    without unreadable images if they are to be skipped."""
    return _prepare(cfg, list_train_data(cfg), "TRAIN")


def build_test_data(
    cfg: CfgNode, class_names: Sequence[str] | None = None, *, other_root: bool = False
) -> ImageDataset:
    """Build TEST.SPLIT of the test set, or the held-out images if there is no test set, without
    unreadable images if they are to be skipped.

    Args:
        cfg: The config.
        class_names: Classes of the model, in its order; by default the set's own.
        other_root: Whether the images are not in the folder of the training, so that none of them
            were held out; with `class_names`, a folder of classes only is then tested as a whole.

    Raises:
        DataError: The set has classes that the model does not know.
    """
    if has_test_split(cfg) or (other_root and class_names is not None):
        name = cfg.TEST.DATASET or cfg.TRAIN.DATASET
        return _prepare(cfg, list_split(cfg, name, cfg.TEST.SPLIT, (), class_names), "TEST")
    dataset = list_val_data(cfg)
    if class_names is not None:
        dataset.rename(class_names)
    return _prepare(cfg, dataset, "TEST")


def fetch_data(cfg: CfgNode, world: World) -> Splits:
    """Build the images of a training run; only the main process downloads, the others wait."""
    check_validation(cfg)
    with in_turn(world):
        train = list_train_data(cfg)
        val = list_val_data(cfg) if has_val_split(cfg) else None
        test = list_test_data(cfg) if has_test_split(cfg) else None
    for held_out in filter(None, (val, test)):
        check_same_classes(train, held_out)
    train = _prepare(cfg, train, "TRAIN")
    val, test = (data and _prepare(cfg, data, "TEST") for data in (val, test))
    if val is None:
        assert test is not None
        return Splits(train, test)
    return Splits(train, val, test)


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
        why = f" ({'; '.join(dataset.notes)})" if dataset.notes else ""
        raise ConfigError(
            f"TRAIN.BATCH_SIZE is {cfg.TRAIN.BATCH_SIZE}, but there are only {len(dataset)} "
            f"training images{why}; lower it to {len(dataset)} or less."
        )


def build_train_loader(
    cfg: CfgNode, dataset: ImageDataset, world: World, device: torch.device
) -> TrainLoader | CachedTrainLoader:
    """Build the loader of this process's share of augmented training batches."""
    batches = TrainBatches(
        num_samples=len(dataset),
        batch_size=cfg.TRAIN.BATCH_SIZE,
        seed=cfg.RNG_SEED,
        max_epoch=cfg.OPTIM.MAX_EPOCH,
        rank=world.rank,
        world_size=world.size,
        weights=_balance(cfg, dataset)[dataset.labels] if cfg.TRAIN.BALANCE == "sampling" else None,
    )
    transform = _train_transform(cfg)
    cache = _build_cache(cfg, dataset, transform.prepare, world, device)
    if cache is not None:
        return CachedTrainLoader(cache, transform, batches, device=_augmentation_device(device))
    return TrainLoader(
        Samples(dataset, transform),
        batches,
        num_workers=cfg.DATA_LOADER.NUM_WORKERS,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY,
        timeout=cfg.DATA_LOADER.TIMEOUT,
    )


def build_test_loader(
    cfg: CfgNode, dataset: ImageDataset, world: World, device: torch.device
) -> TestLoader:
    """Build the loader of this process's share of test batches."""
    share = {"batch_size": cfg.TEST.BATCH_SIZE, "rank": world.rank, "world_size": world.size}
    transform = BatchTestTransform(**vars(build_preprocessing(cfg)))
    cache = _build_cache(cfg, dataset, transform.prepare, world, device)
    if cache is not None:
        return CachedTestLoader(cache, transform, device=_augmentation_device(device), **share)
    return test_loader(
        Samples(dataset, transform),
        num_workers=cfg.DATA_LOADER.NUM_WORKERS,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY,
        timeout=cfg.DATA_LOADER.TIMEOUT,
        **share,
    )


def _train_transform(cfg: CfgNode) -> BatchTransform:
    return BatchTransform(
        **vars(build_preprocessing(cfg, training=True)),
        strong=cfg.TRAIN.STRONG_AUGMENTATION,
        hflip=cfg.TRAIN.HFLIP,
        seed=cfg.RNG_SEED,
    )


def _build_cache(
    cfg: CfgNode, dataset: ImageDataset, prepare: Prepare, world: World, device: torch.device
) -> ImageCache | None:
    """Build a cache of decoded images, or return None if they do not stay in memory.

    The main process decides for all processes.
    """
    if cfg.DATA_LOADER.BACKEND == "workers":
        return None
    place = from_main(lambda: _choose_place(cfg, dataset, prepare, world, device))
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
            f"DATA_LOADER.BACKEND is device, but the images of {dataset} take "
            f"about {needed / 1e9:.1f} GB once decoded, in each of {world.local_size} processes, "
            f"and at most a quarter of the {free / 1e9:.1f} GB of free memory may be used: set it "
            "to workers."
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


def build_class_weights(
    cfg: CfgNode, dataset: ImageDataset, device: torch.device
) -> torch.Tensor | None:
    """Build the weights of the classes in the loss; None unless TRAIN.BALANCE is weights."""
    if cfg.TRAIN.BALANCE != "weights":
        return None
    return torch.tensor(_balance(cfg, dataset), dtype=torch.float32, device=device)


def _balance(cfg: CfgNode, dataset: ImageDataset) -> np.ndarray:
    """Return the weights of the classes.

    Raises:
        ConfigError: All classes have the same size.
    """
    weights = class_weights(dataset)
    if len(set(weights[weights > 0].tolist())) == 1:
        raise ConfigError(
            f"TRAIN.BALANCE is {cfg.TRAIN.BALANCE}, but all classes of the {len(dataset)} training "
            f"images of {dataset.name} have the same size: set it to none."
        )
    return weights


def build_mixing(cfg: CfgNode) -> Mixing:
    """Build label smoothing, mixup and CutMix."""
    return Mixing(
        num_classes=cfg.MODEL.NUM_CLASSES,
        smoothing=cfg.TRAIN.LABEL_SMOOTHING,
        mixup_alpha=cfg.TRAIN.MIXUP_ALPHA,
        cutmix_alpha=cfg.TRAIN.CUTMIX_ALPHA,
    )


def _prepare(cfg: CfgNode, dataset: ImageDataset, section: str) -> ImageDataset:
    """Check that a set fits the config, and drop unreadable images if they are to be skipped."""
    check_num_classes(cfg, dataset, section)
    if cfg.DATA_LOADER.ON_ERROR == "skip":
        threads = usable_workers(cfg.DATA_LOADER.NUM_WORKERS)
        unreadable = from_main(lambda: find_unreadable(dataset, num_threads=threads))
        dataset = drop_unreadable(dataset, unreadable)
    if section == "TRAIN":
        check_batch_size(cfg, dataset)
    return dataset
