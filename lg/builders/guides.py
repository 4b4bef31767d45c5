"""The guide: its model with its weights, or its stored maps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from yacs.config import CfgNode

from lg.augment.preprocessing import fill_colour, renormalization
from lg.builders.data import dataset_facts
from lg.builders.families import build_resnet, model_sizes, with_keys
from lg.builders.preprocessing import build_preprocessing, check_window, guide_preprocessing
from lg.checkpoint import foreign_weights, load_weights, read_checkpoint
from lg.config import flatten, is_guided, stored_config
from lg.datasets.base import ImageDataset
from lg.errors import CheckpointError, ConfigError, first_few
from lg.guidance import FeatureBank, FrozenTeacher, NoGuide
from lg.models.backbone import Backbone
from lg.models.published import weights_hash
from lg.models.taps import map_shapes
from lg.models.timm_models import timm_model
from lg.paths import is_local_file

Guide = FrozenTeacher | FeatureBank | NoGuide


def build_teacher(cfg: CfgNode, *, trained: bool = True) -> Backbone:
    """Return the guide's model, see `load_teacher`."""
    return load_teacher(cfg, trained=trained)[0]


def load_teacher(cfg: CfgNode, *, trained: bool = True) -> tuple[Backbone, dict[str, Any]]:
    """Return the guide's model, and the other facts of its file as `load_weights` returns them.

    Args:
        cfg: The config.
        trained: Load DISTILLATION.TEACHER_WEIGHTS; pass False if only its shape matters.
    """
    options = cfg.DISTILLATION
    sizes = model_sizes(cfg, options.TEACHER_IMG_SIZE)
    path = options.TEACHER_WEIGHTS if trained else None
    foreign = None
    if path and options.TEACHER_MODEL != "ResNet" and not options.ENABLE_LOGIT:
        # Weights that timm publishes work as well: only maps are imitated, whatever the classes.
        state = read_checkpoint(path, cache=cfg.DOWNLOAD_CACHE)
        foreign = None if "model_state" in state else foreign_weights(state, path)
    # The random state stays, so a guided student starts from the same weights as a plain one.
    with torch.random.fork_rng(devices=[]):
        if options.TEACHER_MODEL == "ResNet":
            teacher = build_resnet(cfg, **sizes)
        else:
            name = options.TEACHER_MODEL.removeprefix("timm/")
            try:
                teacher = timm_model(name, **sizes, pretrained=foreign)
            except ValueError as error:
                message = with_keys(str(error), {"img_size": "DISTILLATION.TEACHER_IMG_SIZE"})
                raise ConfigError(
                    f"DISTILLATION.TEACHER_MODEL {options.TEACHER_MODEL!r} cannot be built: "
                    f"{message}"
                ) from error
    facts: dict[str, Any] = {}
    if path and foreign is None:
        facts = _load_guide(cfg, teacher, path)
        check_window(cfg, facts, path)
    elif trained and not path:
        warnings.warn(
            "DISTILLATION.TEACHER_WEIGHTS is null: the guide has random weights.", stacklevel=2
        )
    return teacher, facts


def guide_renormalization(
    cfg: CfgNode, facts: dict[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return what turns the student's images into those that the guide was trained on."""
    student = build_preprocessing(cfg, training=True)
    options = cfg.DISTILLATION
    guide = guide_preprocessing(
        facts,
        str(options.TEACHER_WEIGHTS),
        kind=options.TEACHER_MODEL,
        channels=cfg.MODEL.IN_CHANNELS,
    )
    return renormalization(student, guide)


def _load_guide(cfg: CfgNode, teacher: Backbone, path: str) -> dict[str, Any]:
    """Load the guide's weights; return the other facts of the file.

    Raises:
        CheckpointError: They do not fit; the message names the key, and where the config that the
            file was trained with differs from this one.
    """
    try:
        return load_weights(teacher, path, cache=cfg.DOWNLOAD_CACHE)
    except CheckpointError as error:
        hint = _guide_differences(cfg, path)
        raise CheckpointError(f"DISTILLATION.TEACHER_WEIGHTS: {error}{hint}") from None


def check_guide_classes(cfg: CfgNode, class_names: Sequence[str]) -> None:
    """Check that a guide whose logits are imitated knows the classes of the training images.

    Raises:
        CheckpointError: Its file names others, or another order.
    """
    options = cfg.DISTILLATION
    if not options.ENABLE_LOGIT or not options.TEACHER_WEIGHTS:
        return
    path = options.TEACHER_WEIGHTS
    theirs = read_checkpoint(path, cache=cfg.DOWNLOAD_CACHE).get("class_names")
    if theirs is not None and theirs != list(class_names):
        raise CheckpointError(
            f"DISTILLATION.TEACHER_WEIGHTS is {path}, which was trained on the classes "
            f"{first_few(theirs)}, but the training images have {first_few(class_names)}; "
            "DISTILLATION.ENABLE_LOGIT would imitate scores of other classes: train the guide on "
            "these images"
        )


def guide_notes(cfg: CfgNode) -> list[str]:
    """Return what is wrong with the images that the guide was trained on, as far as its file names
    them: it saw held-out or excluded images, or belongs to another data set."""
    options, train = cfg.DISTILLATION, cfg.TRAIN
    path = options.TEACHER_WEIGHTS
    if not is_guided(cfg) or options.OFFLINE or not path:
        return []
    guide = stored_config(read_checkpoint(path, cache=cfg.DOWNLOAD_CACHE))
    if not guide:
        return []
    dataset = guide.get("TRAIN.DATASET", train.DATASET)
    if dataset != train.DATASET:
        return [
            f"the guide was trained on {dataset}, but TRAIN.DATASET is {train.DATASET} ({path})"
        ]
    guide.setdefault("TRAIN.SPLIT_SEED", guide.get("RNG_SEED"))  # older files lack it
    mine = dict(flatten(cfg))
    splits = "TRAIN.FRACTION", "TRAIN.VAL_FRACTION", "TRAIN.SPLIT_SEED"
    notes = []
    if train.VAL_FRACTION > 0 and any(guide.get(key) != mine[key] for key in splits):
        notes.append(
            "was trained on some of the held-out images, so they are less new to the student than "
            f"test images: train it with the same {', '.join(splits[:2])} and {splits[2]}"
        )
    if train.EXCLUDE and guide.get("TRAIN.EXCLUDE") != train.EXCLUDE:
        notes.append("was trained on images that TRAIN.EXCLUDE leaves out: train it with that")
    return [f"the guide {note} ({path})" for note in notes]


def _guide_differences(cfg: CfgNode, path: str) -> str:
    """Return how the config of a guide's file differs from what this config expects of the guide;
    empty if the file holds no config, or no such difference."""
    try:
        theirs = stored_config(read_checkpoint(path, cache=cfg.DOWNLOAD_CACHE))
    except CheckpointError:
        return ""
    kind = cfg.DISTILLATION.TEACHER_MODEL
    sections = ("MODEL.NUM_CLASSES", "MODEL.IN_CHANNELS") + ("CNN.", "RESNET.") * (kind == "ResNet")
    mine = {key: value for key, value in flatten(cfg) if key.startswith(sections)}
    if theirs.get("MODEL.TYPE") != kind:  # then the depths cannot be compared
        mine = {"MODEL.TYPE": kind}
    wrong = [key for key in mine if key in theirs and theirs[key] != mine[key]]
    if not wrong:
        return ""
    trained = ", ".join(f"{key} {theirs[key]}" for key in wrong)
    expected = ", ".join(f"{key} {mine[key]}" for key in wrong)
    expected = expected.replace("MODEL.TYPE", "DISTILLATION.TEACHER_MODEL")
    return (
        f". The file was trained with {trained} (TRAIN.DATASET {theirs.get('TRAIN.DATASET')}); "
        f"this config expects {expected}: make them equal, or name the weights of another guide"
    )


def open_guide_bank(cfg: CfgNode, teacher: Backbone) -> FeatureBank:
    """Return the stored maps, checked against the guide of the config."""
    options = cfg.DISTILLATION
    bank = FeatureBank(options.FEATURE_FILE, options.INTER_TEACHER_INDEX)
    shapes = map_shapes(
        teacher,
        options.INTER_TEACHER_INDEX,
        image_size=options.TEACHER_IMG_SIZE,
        in_channels=cfg.MODEL.IN_CHANNELS,
    )
    weights = None
    if options.TEACHER_WEIGHTS and is_local_file(options.TEACHER_WEIGHTS):
        weights = weights_hash(build_teacher(cfg))
    fill = None
    if cfg.TRAIN.RESIZE == "letterbox":
        fill = list(fill_colour(build_preprocessing(cfg, training=True).mean))
    bank.check(
        indices=bank.indices,
        shapes=shapes,
        teacher=model_name(cfg, options.TEACHER_MODEL),
        weights=weights,
        image_size=cfg.MODEL.IMG_SIZE,
        resize=cfg.TRAIN.RESIZE,
        fill=fill,
        teacher_image_size=options.TEACHER_IMG_SIZE,
    )
    return bank


def prepare_bank(cfg: CfgNode, guide: Guide, dataset: ImageDataset, device: torch.device) -> None:
    """Check stored maps against the training set and load them to FEATURE_PLACE."""
    if not isinstance(guide, FeatureBank):
        return
    guide.check(indices=dataset.indices, shapes=guide.shapes, **dataset_facts(dataset))
    if cfg.DISTILLATION.FEATURE_PLACE == "device":
        guide.make_resident(device)


def model_name(cfg: CfgNode, kind: str) -> str:
    """Return the type of a model; for a ResNet with its depth."""
    return f"ResNet-{cfg.CNN.DEPTH}" if kind == "ResNet" else kind
