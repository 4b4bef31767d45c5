"""Published learning curves, and the settings they were measured with."""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode

from lg.config.defaults import flatten

# (settings that make a run comparable, epoch -> test top-1 in percent)
CURVES: list[tuple[dict[str, Any], dict[int, float]]] = [
    (
        # DeiT-Ti guided by the logits of a ResNet-56 that sees 32-pixel images; no feature maps.
        {
            "MODEL.TYPE": "DeiT",
            "MODEL.IMG_SIZE": 224,
            "TRANSFORMER.PATCH_SIZE": 16,
            "TRANSFORMER.HIDDEN_DIM": 192,
            "TRANSFORMER.DEPTH": 12,
            "TRANSFORMER.NUM_HEADS": 3,
            "TRANSFORMER.WIDE_LAST": 0,
            "TRANSFORMER.LIFT": 0,
            "CNN.DEPTH": 56,
            "TRAIN.DATASET": "cifar100",
            "TRAIN.FRACTION": 1.0,
            "TRAIN.VAL_FRACTION": 0.0,
            "TRAIN.EXCLUDE": "",
            "TRAIN.PATCH_DROP": 0.0,
            "TRAIN.WEIGHTS": "",
            "TEST.SPLIT": "test",
            "OPTIM.MAX_EPOCH": 300,
            "DISTILLATION.ENABLE_INTER": False,
            "DISTILLATION.ENABLE_LOGIT": True,
            "DISTILLATION.LOGIT_LOSS": "soft",
            "DISTILLATION.LOGIT_WEIGHT": 0.5,
            "DISTILLATION.SCHEDULE": "static",
            "DISTILLATION.TEACHER_MODEL": "ResNet",
            "DISTILLATION.TEACHER_IMG_SIZE": 32,
        },
        {26: 39.0, 51: 57.8, 76: 65.0, 101: 69.7, 151: 74.1, 201: 76.9, 251: 78.2, 300: 78.5},
    ),
]


def published_curve(cfg: CfgNode) -> dict[int, float]:
    """Return the published test top-1 (percent) by epoch for a config; empty if unknown."""
    values = dict(flatten(cfg))
    if cfg.TEST.DATASET not in ("", cfg.TRAIN.DATASET):
        return {}
    for settings, curve in CURVES:
        if all(values[key] == value for key, value in settings.items()):
            return curve
    return {}
