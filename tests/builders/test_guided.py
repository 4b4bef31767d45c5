"""Guided students of the config: which of their outputs learn what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lg
from tests.config.test_generated import TINY

GUIDE = {"CNN": {"DEPTH": 8}, "TRAIN": {"DATASET": "digits", "BATCH_SIZE": 8}}


def tiny_config(path: Path, kind: str, **distillation: Any) -> Any:
    """Return a small model of a family at 16 pixels, guided by an untrained ResNet-8."""
    tree = {"MODEL": {"TYPE": kind, "IMG_SIZE": 16, "NUM_CLASSES": 10}, **TINY[kind], **GUIDE}
    tree["DISTILLATION"] = {"TEACHER_IMG_SIZE": 16, **distillation}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return lg.load_config(path)


@pytest.mark.filterwarnings("ignore:DISTILLATION.TEACHER_WEIGHTS is null")
@pytest.mark.parametrize("kind", TINY)
def test_every_family_imitates_logits(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    options = {"ENABLE_LOGIT": True, "LOGIT_STANDARDIZE": True, "LOGIT_WEIGHT": 1.0}
    guided, guide, loss = lg.build_guided(tiny_config(tmp_path / "run.yaml", kind, **options))
    images = torch.randn(4, 3, 16, 16)
    logits, maps = guided.train()(images)
    assert isinstance(logits, tuple) == (kind == "DeiT") and maps == []
    terms = loss(logits, maps, torch.eye(10)[:4], *guide(images))
    terms["loss"].backward()
    assert terms["loss"] == terms["logit"] > 0
    # The classifier that imitates; labels teach nothing at LOGIT_WEIGHT 1.
    head = guided.student.net.get_classifier()  # type: ignore[operator]
    imitating = head[1] if isinstance(head, tuple) else head
    parameters: list[Any] = list(imitating.parameters())
    assert parameters and all(p.grad.any() for p in parameters)
