"""Builds the preprocessing of images: the facts that tests, prediction and exports share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from timm.models import get_pretrained_cfg
from yacs.config import CfgNode

from lg.augment.preprocessing import Preprocessing
from lg.checkpoint import read_checkpoint
from lg.config import stored_config, with_values
from lg.datasets.base import ImageDataset
from lg.datasets.image import PixelFormat
from lg.datasets.loader import usable_workers
from lg.datasets.statistics import pixel_statistics
from lg.distributed import World, from_main, in_turn
from lg.errors import CheckpointError, ConfigError

_FAR_BLACK = 10  # standard deviations; ImageNet: 2


def build_preprocessing(cfg: CfgNode, *, training: bool = False) -> Preprocessing:
    """Build the preprocessing of tests and prediction, or that of training images.

    Raises:
        ConfigError: DATA_LOADER.NORMALIZE is auto, and MEAN and STD are not known yet.
    """
    resize = cfg.TRAIN.RESIZE if training else cfg.TEST.RESIZE or cfg.TRAIN.RESIZE
    found = replace(_imagenet(cfg.MODEL.IMG_SIZE, cfg.MODEL.IN_CHANNELS), resize=resize)
    options = cfg.DATA_LOADER
    if options.NORMALIZE == "imagenet":
        return found
    if not options.MEAN:
        raise ConfigError(
            "DATA_LOADER.NORMALIZE is auto, but neither training images nor weights give the "
            "numbers: train first, or set it to values, with DATA_LOADER.MEAN and STD."
        )
    mean, std = (tuple(map(float, values)) for values in (options.MEAN, options.STD))
    return replace(found, mean=mean, std=std)


def with_data_statistics(cfg: CfgNode, dataset: ImageDataset) -> CfgNode:
    """Return the config with the MEAN and STD of the training images, if NORMALIZE is auto.

    The config is stored in checkpoints, so tests and prediction have the same numbers. Every
    process calls this, and the main process reads the images.
    """
    options = cfg.DATA_LOADER
    if options.NORMALIZE != "auto":
        return cfg
    threads = usable_workers(options.NUM_WORKERS)
    return _with(cfg, *from_main(lambda: pixel_statistics(dataset, num_threads=threads)))


def with_trained_statistics(cfg: CfgNode, weights: str, world: World) -> CfgNode:
    """Return the config with the MEAN and STD that weights were trained with, if NORMALIZE is auto.

    Raises:
        CheckpointError: The file cannot be read.
        ConfigError: MEAN, STD, WINDOW or TRAIN.RESIZE differ from those of the weights, or
            NORMALIZE is auto and the weights have none.
    """
    with in_turn(world):  # a URL is downloaded once
        state = read_checkpoint(weights, cache=cfg.DOWNLOAD_CACHE)
    trained = trained_preprocessing(state, weights)
    check_window(cfg, state, weights)
    resize = stored_config(state).get("TRAIN.RESIZE", cfg.TRAIN.RESIZE)
    if resize != cfg.TRAIN.RESIZE:
        raise ConfigError(
            f"TRAIN.RESIZE is {cfg.TRAIN.RESIZE}, but {weights} was trained with {resize}: set it "
            "to that."
        )
    options = cfg.DATA_LOADER
    if trained is None:
        build_preprocessing(cfg)  # raises for auto
        return cfg
    if options.NORMALIZE == "auto" and not options.MEAN:
        return _with(cfg, trained.mean, trained.std)
    given = build_preprocessing(cfg)
    if (given.mean, given.std) != (trained.mean, trained.std):
        raise ConfigError(
            f"DATA_LOADER.NORMALIZE is {options.NORMALIZE} (mean {_shown(given.mean)}, standard "
            f"deviation {_shown(given.std)}), but {weights} was trained with mean "
            f"{_shown(trained.mean)} and standard deviation {_shown(trained.std)}: set it as in "
            "the config that the weights were trained with."
        )
    return cfg


def trained_preprocessing(state: Mapping[str, Any], name: str) -> Preprocessing | None:
    """Return the preprocessing of the tests of the run that saved a checkpoint.

    Args:
        state: A checkpoint, or what `load_weights` returns.
        name: The file, for error messages.

    Returns:
        None for files without a config, such as published weights.

    Raises:
        CheckpointError: The config in the file is damaged.
    """
    if not isinstance(state.get("cfg"), str):
        return None
    config = stored_config(state)
    try:
        found = _imagenet(int(config["MODEL.IMG_SIZE"]), int(config.get("MODEL.IN_CHANNELS", 3)))
        if not config.get("DATA_LOADER.MEAN"):  # imagenet, as before there was the key
            return found
        mean, std = (tuple(map(float, config[f"DATA_LOADER.{key}"])) for key in ("MEAN", "STD"))
        return replace(found, mean=mean, std=std)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{name} holds a damaged config. Use another copy.") from None


def guide_preprocessing(
    facts: Mapping[str, Any], name: str, *, kind: str, channels: int
) -> Preprocessing:
    """Return the preprocessing that a guide was trained with.

    Args:
        facts: Of the guide, as `load_weights` returns them. Files without a config, such as those
            that timm publishes, have the numbers that timm states for the model, or ImageNet's.
        name: The guide's file, for error messages.
        kind: Its type, such as ResNet or timm/resnet18.
        channels: Of its images.
    """
    found = trained_preprocessing(facts, name)
    if found is not None:
        return found
    stated = get_pretrained_cfg(kind.removeprefix("timm/")) if kind.startswith("timm/") else None
    if stated is None:
        return _imagenet(1, channels)
    return _for_channels(Preprocessing(1, mean=stated.mean, std=stated.std), channels)


def check_window(cfg: CfgNode, state: Mapping[str, Any], name: str) -> None:
    """Check that weights were trained with the same DATA_LOADER.WINDOW, if their file has a config.

    Args:
        cfg: The config.
        state: A checkpoint, or what `load_weights` returns.
        name: The file, for the error message.

    Raises:
        ConfigError: It is another one.
    """
    if trained_preprocessing(state, name) is None:
        return
    trained = list(stored_config(state).get("DATA_LOADER.WINDOW") or [])
    if trained != list(cfg.DATA_LOADER.WINDOW):
        raise ConfigError(
            f"DATA_LOADER.WINDOW is {list(cfg.DATA_LOADER.WINDOW)}, but {name} was trained with "
            f"{trained}: set it to that, or use other weights."
        )


def range_note(preprocessing: Preprocessing) -> str:
    """Return a warning if images use a small part of their range; empty if they do not.

    Borders that crops and augmentation fill with black would then dwarf everything else.
    """
    black = min(preprocessing.black)
    if black > -_FAR_BLACK:
        return ""
    return (
        f"Black is {-black:.0f} standard deviations below the mean of the training images, which "
        "use a small part of their range: set DATA_LOADER.WINDOW to that part, with "
        "MODEL.IN_CHANNELS 1."
    )


def build_pixel_format(cfg: CfgNode) -> PixelFormat:
    """Build what images are converted to: RGB, or gray with its window."""
    window = cfg.DATA_LOADER.WINDOW
    return PixelFormat(cfg.MODEL.IN_CHANNELS, (window[0], window[1]) if window else None)


def _imagenet(image_size: int, channels: int) -> Preprocessing:
    """Return the preprocessing with ImageNet's numbers, for gray images their averages."""
    return _for_channels(Preprocessing(image_size), channels)


def _for_channels(found: Preprocessing, channels: int) -> Preprocessing:
    if channels == 3:
        return found
    mean, std = (round(sum(values) / 3, 3) for values in (found.mean, found.std))
    return replace(found, mean=(mean,) * channels, std=(std,) * channels)


def _with(cfg: CfgNode, mean: Sequence[float], std: Sequence[float]) -> CfgNode:
    return with_values(cfg, {"DATA_LOADER.MEAN": list(mean), "DATA_LOADER.STD": list(std)})


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
