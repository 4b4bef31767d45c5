"""Combinations of values about the student that cannot take effect together.

They are rules as in `lg.config.combinations`.
"""

from __future__ import annotations

from collections.abc import Iterator

from yacs.config import CfgNode

from lg.config.rules import Fault

# Why they cannot drop patches.
_NEED_ALL_PATCHES = {
    **dict.fromkeys(("PiT", "PVT", "PVTv2", "CvT"), "it downsamples between stages"),
    "ConViT": "its gated attention depends on the distances of all pairs",
}


def student_faults(cfg: CfgNode) -> Iterator[Fault]:
    """Yield the faults of initial weights, widths and dropped patches."""
    yield from _initial_weights(cfg)
    yield from _widths(cfg)
    yield from _patch_drop(cfg)


def _initial_weights(cfg: CfgNode) -> Iterator[Fault]:
    model = cfg.MODEL
    if model.INIT != "mimetic":
        return
    if model.TYPE in ("PVT", "PVTv2", "ConViT", "CvT", "ResNet"):
        yield (
            "MODEL.INIT",
            f"MODEL.TYPE {model.TYPE} has no plain multi-head attention (DeiT, T2TViT, PiT and "
            "vision transformers of timm have): set it to default.",
        )
    if model.PRETRAINED or cfg.TRAIN.WEIGHTS:
        key = "MODEL.PRETRAINED" if model.PRETRAINED else "TRAIN.WEIGHTS"
        yield "MODEL.INIT", f"{key} sets the initial weights: set it to '', or this to default."


def _widths(cfg: CfgNode) -> Iterator[Fault]:
    transformer = cfg.TRANSFORMER
    if transformer.WIDE_LAST and transformer.LIFT:
        yield (
            "TRANSFORMER.LIFT",
            "TRANSFORMER.WIDE_LAST widens the last block already: set one of the two to 0.",
        )
    for name in ("WIDE_LAST", "LIFT"):
        if isinstance(width := transformer.HIDDEN_DIM, int) and 0 < transformer[name] <= width:
            yield f"TRANSFORMER.{name}", f"it must exceed TRANSFORMER.HIDDEN_DIM {width}, or be 0."


def _patch_drop(cfg: CfgNode) -> Iterator[Fault]:
    kind, options = cfg.MODEL.TYPE, cfg.DISTILLATION
    if cfg.TRAIN.PATCH_DROP == 0:
        return
    if kind == "ResNet":
        yield "TRAIN.PATCH_DROP", "MODEL.TYPE ResNet has no patches: set it to 0."
    if kind in _NEED_ALL_PATCHES:
        yield (
            "TRAIN.PATCH_DROP",
            f"MODEL.TYPE {kind} needs all patches, because {_NEED_ALL_PATCHES[kind]} (DeiT, "
            "T2TViT and vision transformers of timm work with a subset): set it to 0.",
        )
    if options.ENABLE_INTER and options.INTER_TRANSFORM == "similarity":
        yield (
            "TRAIN.PATCH_DROP",
            "DISTILLATION.INTER_TRANSFORM similarity compares images position by position, but "
            "each image keeps different positions: choose another transform, or set this to 0.",
        )
    is_wide = cfg.TRANSFORMER.WIDE_LAST or cfg.TRANSFORMER.LIFT
    if options.ENABLE_INTER and options.INTER_STUDENT_INDEX == "mix" and is_wide:
        yield (
            "TRAIN.PATCH_DROP",
            "DISTILLATION.INTER_STUDENT_INDEX mix resizes maps of blocks of different widths, "
            "which needs all patches: set TRANSFORMER.WIDE_LAST and LIFT, or this, to 0.",
        )
