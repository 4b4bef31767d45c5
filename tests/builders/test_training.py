"""What training needs, checked and built from the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import lg
from lg import builders
from lg.distributed import World
from lg.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config(name: str, *opts: str) -> Any:
    return lg.load_config(CONFIGS / name, ["TRAIN.SYNC_BN", "True", *opts])


def test_sync_bn_converts_student_and_guide_on_gpus() -> None:
    cfg = config("cvt/cvt-13_c100_ours.yaml", "DISTILLATION.TEACHER_WEIGHTS", "None")
    student = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4))
    frozen = nn.Sequential(nn.BatchNorm2d(4)).eval()
    teacher = nn.Sequential(nn.BatchNorm1d(4))
    names = list(student.state_dict())
    parts = (student, frozen, teacher, None)
    builders.synchronize_batch_norms(cfg, parts, World(size=1), GPU)
    assert isinstance(student[1], BatchNormAct2d)  # nothing to synchronise with
    builders.synchronize_batch_norms(cfg, parts, World(size=2), GPU)
    assert isinstance(teacher[0], nn.SyncBatchNorm) and isinstance(student[1], nn.SyncBatchNorm)
    assert isinstance(student[1].act, nn.ReLU) and isinstance(frozen[0], nn.BatchNorm2d)
    assert list(student.state_dict()) == names


def test_sync_bn_is_rejected_where_it_cannot_take_effect() -> None:
    student = nn.Sequential(nn.BatchNorm2d(4))
    with pytest.raises(ConfigError, match=r"TRAIN.SYNC_BN is True, .* on cpu: set it to False"):
        builders.synchronize_batch_norms(
            config("resnet/r-56_c100.yaml"), [student], World(size=2), CPU
        )
    cfg = config("deit/deit-ti_c100_base.yaml")
    with pytest.raises(ConfigError, match=r"TRAIN.SYNC_BN is True, but no BatchNorm of .*DeiT"):
        builders.synchronize_batch_norms(cfg, [nn.LayerNorm(4), student.eval()], World(), GPU)
    assert all(
        type(each) is nn.BatchNorm2d for each in student.modules() if isinstance(each, _BatchNorm)
    )


def test_buffers_are_not_sent_before_each_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ConViT's distances nor BatchNorm statistics: each test sends those it needs."""
    monkeypatch.setattr(builders.run, "DistributedDataParallel", lambda *_, **__: nn.Identity())
    cfg = lg.load_config(CONFIGS / "digits/vit_digits_base.yaml", ["DEVICE", "cpu"])
    args = nn.Linear(2, 2), None, World(size=2), CPU, None, None
    module, _ = builders.run._wrap(cfg, *args)
    assert module.broadcast_buffers is False
