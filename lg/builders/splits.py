"""Which images a training run trains on, which choose the best epoch, and which test it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from yacs.config import CfgNode

from lg.builders.preprocessing import build_pixel_format
from lg.datasets import build_dataset
from lg.datasets.base import MISSING, ImageDataset, hold_out, stratified_subset
from lg.datasets.exclusion import leave_out, read_excluded
from lg.datasets.image_folder import splits_of
from lg.errors import ConfigError, first_few


class Splits(NamedTuple):
    """The images of a training run.

    Attributes:
        train: Trained on.
        test: Tested every TEST.PERIOD epochs; chooses the best epoch.
        final: The test set, tested once at the end with the best weights; None if `test` is the
            test set, or there is none.
    """

    train: ImageDataset
    test: ImageDataset
    final: ImageDataset | None = None


def has_val_split(cfg: CfgNode) -> bool:
    """Return whether other images than the test set choose the best epoch."""
    return cfg.TRAIN.VAL_FRACTION > 0 or _has_val_folder(cfg)


def has_test_split(cfg: CfgNode) -> bool:
    """Return whether there is a test set; there may be none if other images choose the epoch.

    With TRAIN.VAL_FRACTION, val/ of an image_folder without test/ is its test set.
    """
    if not _is_folder(cfg):
        return True
    splits = splits_of(cfg.DATA_LOADER.ROOT)
    if cfg.TRAIN.VAL_FRACTION > 0:
        return bool({"val", "test"} & set(splits))
    return "test" in splits or not _has_val_folder(cfg)  # without one, listing it is an error


def _is_folder(cfg: CfgNode) -> bool:
    return (cfg.TEST.DATASET or cfg.TRAIN.DATASET) == "image_folder"


def _has_val_folder(cfg: CfgNode) -> bool:
    """Return whether val/ of an image_folder is tested during training: not if held-out images
    are, and it is the only test set."""
    if not _is_folder(cfg) or cfg.TEST.SPLIT == "train":
        return False
    splits = splits_of(cfg.DATA_LOADER.ROOT)
    return "val" in splits and ("test" in splits or cfg.TRAIN.VAL_FRACTION == 0)


def check_validation(cfg: CfgNode) -> None:
    """Check that one split chooses the best epoch, and that it may stop training.

    Raises:
        ConfigError: There are two, or none.
    """
    train, root = cfg.TRAIN, cfg.DATA_LOADER.ROOT
    if train.VAL_FRACTION > 0 and _has_val_folder(cfg):
        raise ConfigError(
            f"TRAIN.VAL_FRACTION is {train.VAL_FRACTION}, but {root} has test/ and val/, and val/ "
            "chooses the best epoch: set it to 0, or move the images of val/ to train/."
        )
    if train.EARLY_STOP > 0 and not has_val_split(cfg):
        raise ConfigError(
            f"TRAIN.EARLY_STOP is {train.EARLY_STOP}, but the test set must not decide when "
            f"training stops and {root} has no val/: "
            "hold out images with TRAIN.VAL_FRACTION, such as 0.1, or set this to 0."
        )


def list_train_data(cfg: CfgNode, tolerate: Iterable[str] = ()) -> ImageDataset:
    """List the training images without opening them; see `build_dataset` for `tolerate`."""
    dataset = _list_train_split(cfg, tolerate)
    if cfg.TRAIN.VAL_FRACTION == 0:
        return dataset
    return hold_out(dataset, cfg.TRAIN.VAL_FRACTION, cfg.TRAIN.SPLIT_SEED)[0]


def list_val_data(cfg: CfgNode, tolerate: Iterable[str] = ()) -> ImageDataset:
    """List the images other than the test set that choose the best epoch; see `has_val_split`."""
    if cfg.TRAIN.VAL_FRACTION > 0:
        dataset = _list_train_split(cfg, tolerate)
        return hold_out(dataset, cfg.TRAIN.VAL_FRACTION, cfg.TRAIN.SPLIT_SEED)[1]
    dataset = list_test_data(cfg, "val", tolerate)
    if cfg.TEST.SPLIT == "test" and not has_test_split(cfg):
        dataset.notes.append(
            f"TEST.SPLIT is test, but {cfg.DATA_LOADER.ROOT} has no test set: its val split is "
            "used instead, and its best accuracy is optimistic"
        )
    return dataset


def list_test_data(cfg: CfgNode, split: str = "", tolerate: Iterable[str] = ()) -> ImageDataset:
    """List the test images without opening them; see `build_dataset` for `tolerate`.

    Args:
        cfg: The config.
        split: By default TEST.SPLIT, or test if val/ of an image_folder chooses the best epoch.
        tolerate: As for `build_dataset`.
    """
    split = split or ("test" if _has_val_folder(cfg) else cfg.TEST.SPLIT)
    return list_split(cfg, cfg.TEST.DATASET or cfg.TRAIN.DATASET, split, tolerate)


def _list_train_split(cfg: CfgNode, tolerate: Iterable[str]) -> ImageDataset:
    dataset = list_split(cfg, cfg.TRAIN.DATASET, cfg.TRAIN.SPLIT, tolerate)
    if cfg.TRAIN.EXCLUDE:
        dataset = leave_out(dataset, cfg.TRAIN.EXCLUDE, cfg.DATA_LOADER.ROOT)
    return stratified_subset(dataset, cfg.TRAIN.FRACTION, cfg.TRAIN.SPLIT_SEED)


def list_split(
    cfg: CfgNode,
    name: str,
    split: str,
    tolerate: Iterable[str],
    class_names: Sequence[str] | None = None,
) -> ImageDataset:
    """List a split of a set in DATA_LOADER.ROOT; see `build_dataset` for the arguments."""
    options = cfg.DATA_LOADER
    if options.ON_ERROR == "skip":
        tolerate = {MISSING, *tolerate}
    return build_dataset(
        name,
        options.ROOT,
        split,
        download=options.DOWNLOAD,
        tolerate=tolerate,
        class_names=class_names,
        pixel_format=build_pixel_format(cfg),
    )


def exclusion_line(cfg: CfgNode, train: ImageDataset) -> str:
    """Report how many images TRAIN.EXCLUDE leaves out; empty if it is not set."""
    path = cfg.TRAIN.EXCLUDE
    return path and (
        f"TRAIN.EXCLUDE leaves out {len(read_excluded(path)):,} of the {len(train.full):,} images "
        f"of {train.full} ({path})."
    )


def data_notes(*datasets: ImageDataset | None) -> list[str]:
    """Return what a user should know: notes on lists of images, and classes without any."""
    present = [dataset for dataset in datasets if dataset is not None]
    notes = [note for dataset in present for note in dataset.notes]
    return list(dict.fromkeys([*notes, *filter(None, map(_missing_classes, present))]))


def _missing_classes(dataset: ImageDataset) -> str:
    """Name the classes without images in a split; empty if each class has some."""
    present = set(dataset.labels.tolist())
    absent = [name for k, name in enumerate(dataset.class_names) if k not in present]
    if not absent:
        return ""
    few = first_few(absent)
    return f"{dataset} has no images of {len(absent)} of {dataset.num_classes} classes ({few})"
