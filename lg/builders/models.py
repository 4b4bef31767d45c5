"""Students, and the pairs of blocks that guidance compares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from yacs.config import CfgNode

from lg.builders.families import build_family, build_resnet, model_sizes, single, with_keys
from lg.builders.guides import Guide, guide_renormalization, load_teacher, open_guide_bank
from lg.checkpoint import foreign_weights, read_checkpoint
from lg.config import is_guided
from lg.config.rules import FAMILIES
from lg.errors import ConfigError, UserError, first_line
from lg.guidance import (
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
from lg.models.taps import map_shapes
from lg.models.timm_models import timm_model


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
    sizes = model_sizes(cfg, cfg.MODEL.IMG_SIZE)
    if kind == "ResNet":
        return build_resnet(cfg, **sizes)
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
        guide = open_guide_bank(cfg, teacher)
    else:
        guide = FrozenTeacher(
            teacher,
            indices=teacher_taps,
            image_size=options.TEACHER_IMG_SIZE,
            batch_norm=options.TEACHER_BN,
            with_logits=options.ENABLE_LOGIT,
            renormalize=guide_renormalization(cfg, facts),
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
