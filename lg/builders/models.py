"""Students, guides, and the pairs of blocks that guidance compares."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from yacs.config import CfgNode

from lg.augment.preprocessing import fill_colour, renormalization
from lg.builders.data import dataset_facts
from lg.builders.families import build_family, single, with_keys
from lg.builders.preprocessing import build_preprocessing, check_window, guide_preprocessing
from lg.checkpoint import foreign_weights, load_weights, read_checkpoint
from lg.config import flatten, is_guided, stored_config
from lg.config.rules import FAMILIES
from lg.datasets.base import ImageDataset
from lg.errors import CheckpointError, ConfigError, UserError, first_line
from lg.guidance import (
    FeatureBank,
    FrozenTeacher,
    GuidanceLoss,
    GuidedStudent,
    MixedHeads,
    NoGuide,
)
from lg.guidance.losses import PROJECTED
from lg.models.backbone import Backbone
from lg.models.mimetic import init_mimetic
from lg.models.patch_drop import drop_patches
from lg.models.published import weights_hash
from lg.models.resnet import resnet
from lg.models.taps import map_shapes
from lg.models.timm_models import timm_model
from lg.paths import is_local_file

Guide = FrozenTeacher | FeatureBank | NoGuide


def build_model(cfg: CfgNode, *, pretrained: bool = True) -> Backbone:
    """Return the student, or the CNN, alone: `model(images) -> logits`.

    Args:
        cfg: The config.
        pretrained: Load MODEL.PRETRAINED, if set; pass False if other weights follow.

    Raises:
        CheckpointError: MODEL.PRETRAINED cannot be read.
        ConfigError: Sizes that do not fit together, or an unknown timm model.
    """
    kind = cfg.MODEL.TYPE
    try:
        model = _build_by_type(cfg, pretrained=pretrained)
        if cfg.MODEL.INIT == "mimetic":
            _init_mimetic(model)
        if cfg.TRAIN.PATCH_DROP > 0:
            _drop_patches(model, cfg.TRAIN.PATCH_DROP)
        return model
    except UserError:
        raise
    except ValueError as error:
        message = with_keys(str(error), _student_keys(cfg))
        prefix = f"MODEL.TYPE {kind}: " if kind.startswith("timm/") else ""
        raise ConfigError(prefix + message) from error
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:  # sizes far too large
        reason = first_line(error)
        raise ConfigError(
            f"MODEL.TYPE {kind} cannot be built with these sizes ({reason}): lower those of MODEL, "
            "TRANSFORMER and the model's own section"
        ) from error


def _init_mimetic(model: Backbone) -> None:
    try:
        init_mimetic(model)
    except ValueError as error:
        raise ConfigError(f"MODEL.INIT is 'mimetic', but {error}: set it to default.") from error


def _drop_patches(model: Backbone, rate: float) -> None:
    try:
        drop_patches(model, rate)
    except ValueError as error:
        raise ConfigError(f"TRAIN.PATCH_DROP is {rate}, but {error}: set it to 0.") from error


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
            pretrained=_pretrained_weights(cfg) if pretrained else None,
        )
    section = FAMILIES[kind].section
    if kind == "DeiT":
        sizes["distilled"] = cfg.DISTILLATION.ENABLE_LOGIT
    return build_family(kind, cfg.TRANSFORMER, cfg[section] if section else {}, **sizes)


def _student_keys(cfg: CfgNode) -> dict[str, str]:
    """Return the config key behind each argument that an error about the student may name."""
    keys = {"img_size": "MODEL.IMG_SIZE", "block_names": "MODEL.BLOCKS"}
    family = FAMILIES.get(cfg.MODEL.TYPE)
    for section in ("TRANSFORMER", family.section if family else None):
        if section:
            keys |= {name.lower(): f"{section}.{name}" for name in cfg[section]}
    return keys


def build_guided(cfg: CfgNode) -> tuple[GuidedStudent, Guide, GuidanceLoss]:
    """Return the student with its projection heads, the guide or its stored maps, and the loss.

    Without guidance in the config there are no heads, the guide returns nothing and the loss is
    cross-entropy. If TEACHER_WEIGHTS is null, the guide keeps its random weights, with a warning.
    """
    options = cfg.DISTILLATION
    student = build_model(cfg)
    if not is_guided(cfg):
        return GuidedStudent(student), NoGuide(), GuidanceLoss()
    teacher, facts = load_teacher(cfg, trained=not options.OFFLINE)
    student_taps, teacher_taps = tap_indices(cfg, student, teacher)
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
            renormalize=_renormalization(cfg, facts),
        )
    projected = guide.feature_dims if options.INTER_TRANSFORM in PROJECTED else []
    loss = GuidanceLoss(
        transform=options.INTER_TRANSFORM,
        inter_weight=options.INTER_WEIGHT,
        logit_kind=options.LOGIT_LOSS,
        temperature=options.LOGIT_TEMP,
        standardize=options.LOGIT_STANDARDIZE,
        logit_weight=options.LOGIT_WEIGHT if options.ENABLE_LOGIT else 0.0,
    )
    if options.ENABLE_INTER and options.INTER_STUDENT_INDEX == "mix":
        heads = _build_mixed_heads(cfg, student, teacher, student_taps, teacher_taps)
        return GuidedStudent(student, mixed_heads=heads), guide, loss
    return GuidedStudent(student, indices=student_taps, teacher_dims=projected), guide, loss


def _build_mixed_heads(
    cfg: CfgNode,
    student: Backbone,
    teacher: Backbone,
    taps: Sequence[int],
    guide_taps: Sequence[int],
) -> MixedHeads:
    """Build the heads for INTER_STUDENT_INDEX mix; run one image through each model to get the
    shapes of the maps."""
    channels, options = cfg.MODEL.IN_CHANNELS, cfg.DISTILLATION
    sizes = cfg.MODEL.IMG_SIZE, options.TEACHER_IMG_SIZE
    return MixedHeads(
        map_shapes(student, taps, image_size=sizes[0], in_channels=channels),
        map_shapes(teacher, guide_taps, image_size=sizes[1], in_channels=channels),
    )


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
    sizes = _sizes(cfg, options.TEACHER_IMG_SIZE)
    path = options.TEACHER_WEIGHTS if trained else None
    foreign = None
    if path and options.TEACHER_MODEL != "ResNet" and not options.ENABLE_LOGIT:
        # Weights that timm publishes work as well: only maps are imitated, whatever the classes.
        state = read_checkpoint(path, cache=cfg.DOWNLOAD_CACHE)
        foreign = None if "model_state" in state else foreign_weights(state, path)
    # The random state stays, so a guided student starts from the same weights as a plain one.
    with torch.random.fork_rng(devices=[]):
        if options.TEACHER_MODEL == "ResNet":
            teacher = _build_resnet(cfg, **sizes)
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


def _renormalization(
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
    """Check that a guide whose class scores are imitated knows the classes of the training images.

    Raises:
        CheckpointError: Its file names others, or another order.
    """
    options = cfg.DISTILLATION
    if not options.ENABLE_LOGIT or not options.TEACHER_WEIGHTS:
        return
    path = options.TEACHER_WEIGHTS
    theirs = read_checkpoint(path, cache=cfg.DOWNLOAD_CACHE).get("class_names")
    if theirs is not None and theirs != list(class_names):
        shown = (
            ", ".join(names[:5]) + ", ..." * (len(names) > 5) for names in (theirs, class_names)
        )
        raise CheckpointError(
            "DISTILLATION.TEACHER_WEIGHTS is {}, which was trained on the classes {}, but the "
            "training images have {}; DISTILLATION.ENABLE_LOGIT would imitate scores of other "
            "classes: train the guide on these images".format(path, *shown)
        )


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


def _open_bank(cfg: CfgNode, teacher: Backbone) -> FeatureBank:
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
        teacher=teacher_name(cfg, options.TEACHER_MODEL),
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


def teacher_name(cfg: CfgNode, kind: str) -> str:
    """Return a teacher's type; for a ResNet with its depth."""
    return f"ResNet-{cfg.CNN.DEPTH}" if kind == "ResNet" else kind


def _pretrained_weights(cfg: CfgNode) -> dict[str, torch.Tensor] | None:
    """Load MODEL.PRETRAINED; None if it is not set."""
    path = cfg.MODEL.PRETRAINED
    return foreign_weights(read_checkpoint(path, cache=cfg.DOWNLOAD_CACHE), path) if path else None


def tap_indices(cfg: CfgNode, student: Backbone, teacher: Backbone) -> tuple[list[int], list[int]]:
    """Return the blocks of student and guide that are compared.

    The two lists have equal length, except for INTER_STUDENT_INDEX mix: it compares mixtures of all
    blocks of the student.
    """
    options = cfg.DISTILLATION
    if not options.ENABLE_INTER:
        return [], []
    taps = options.INTER_STUDENT_INDEX
    pairs = [("INTER_STUDENT_INDEX", student), ("INTER_TEACHER_INDEX", teacher)]
    if taps == "mix":
        taps = list(range(len(student.blocks)))
        pairs = pairs[1:]
    for key, model in pairs:
        try:
            model.check_indices(options[key])
        except ValueError as error:
            advice = same_depth(options[key], len(model.blocks))
            hint = f"; use {advice} for the same relative depth" if advice else ""
            raise ConfigError(f"DISTILLATION.{key} is {options[key]}: {error}{hint}.") from None
    return taps, options.INTER_TEACHER_INDEX


def same_depth(taps: Sequence[int], num_blocks: int) -> list[int]:
    """Return the blocks at the relative depth of taps whose last one was the last block; none if
    there are too few blocks."""
    last = max(taps)
    moved = [round(tap * (num_blocks - 1) / last) for tap in taps] if last else []
    return moved if len(set(moved)) == len(moved) else []


def _build_resnet(cfg: CfgNode, **sizes: int) -> Backbone:
    return resnet(
        depth=cfg.CNN.DEPTH,
        **sizes,
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
