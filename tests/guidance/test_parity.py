"""Losses, first steps, learning rates and parameter groups against the published code's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import lg
from lg import builders
from lg.guidance import FrozenTeacher
from lg.models.published import published_name
from tests.reference_fill import fill, reference_input

TESTS = Path(__file__).parents[1]
REFERENCE = TESTS / "reference"
CONFIGS = TESTS.parent / "configs"
LABELS = torch.tensor([3, 42])
GUIDED = "deit/deit-ti_c100_ours.yaml"
NO_WEIGHTS = ["DISTILLATION.TEACHER_WEIGHTS", "null", "TRANSFORMER.DROP_PATH_RATE", "0.0"]


def build(config: str, *options: str) -> tuple:
    """The config's student, guide and loss, all filled with the reference's weights."""
    cfg = lg.load_config(CONFIGS / config, [*NO_WEIGHTS, *options])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the guide is filled below
        guided, guide, loss = lg.build_guided(cfg)
    models = [(guided.student, "")]
    if isinstance(guide, FrozenTeacher):
        models.append((guide.model, "teacher."))
    for model, prefix in models:
        shapes = {k: v.shape for k, v in lg.published_state_dict(model).items()}
        lg.load_published_state_dict(model, fill(shapes, prefix=prefix))
    for i, head in enumerate(guided.heads):
        shapes = {k: v.shape for k, v in head.state_dict().items()}
        head.load_state_dict(
            {
                k.removeprefix(f"feature_transforms.{i}."): v
                for k, v in fill(
                    {f"feature_transforms.{i}.{k}": s for k, s in shapes.items()}
                ).items()
            }
        )
    return cfg, guided, guide, loss


@pytest.mark.parametrize("transform", ["linear", "attention", "similarity"])
@pytest.mark.parametrize("logit", [False, True])
def test_imitation_losses_are_the_published_ones(transform: str, logit: bool) -> None:
    name = "deit-ti_c100_ours_logit" if logit else "deit-ti_c100_ours"
    options = ["DISTILLATION.INTER_TRANSFORM", transform, "DISTILLATION.ENABLE_LOGIT", str(logit)]
    _, guided, guide, loss = build(GUIDED, *options)
    images = reference_input(224)
    with torch.no_grad():
        logits, maps = guided.train()(images)
        terms = loss(logits, maps, F.one_hot(LABELS, 100).float(), *guide(images, None, None))
    key = {"linear": "eval"}.get(transform, transform)
    expected = float(np.load(REFERENCE / f"{name}.npz")[f"guidance_loss_{key}"])
    assert float(terms["inter"]) == pytest.approx(expected, rel=1e-4)


def first_steps(config: str, *, size: int, dtype: torch.dtype) -> np.ndarray:
    """[3, 4]: classification loss, imitation loss, loss and gradient norm of three steps."""
    cfg, guided, guide, loss = build(config)
    guided.to(dtype).train()
    optimizer = builders.build_optimizer(cfg, guided)
    images, targets = reference_input(size).to(dtype), F.one_hot(LABELS, 100).to(dtype)
    rows = []
    for _ in range(3):
        logits, maps = guided(images)
        terms = loss(logits, maps, targets, *guide(images, None, None))
        optimizer.zero_grad()
        terms["loss"].backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in guided.parameters()])
        optimizer.step()
        rows.append([v.item() for v in (terms["cls"], terms["inter"], terms["loss"], norm)])
    return np.array(rows)


@pytest.mark.parametrize("name", ["deit-ti_c100_base", "deit-ti_c100_ours"])
def test_first_steps_of_transformers_are_the_published_ones(name: str) -> None:
    rows = first_steps(f"deit/{name}.yaml", size=224, dtype=torch.float32)
    expected = np.load(REFERENCE / f"{name}.trajectory.npz")["values"][:3]
    np.testing.assert_allclose(rows, expected, rtol=1e-3)


def test_first_steps_of_the_guide_are_the_published_ones() -> None:
    # With batches of two, 55 batch norms and rectifiers magnify rounding: float32 on two machines
    # differs by percents after one step. In float64 the recorded numbers come out, their own
    # rounding aside, which shows in the norm of the third gradient.
    rows = first_steps("resnet/r-56_c100.yaml", size=32, dtype=torch.float64)
    expected = np.load(REFERENCE / "r-56_c100.trajectory.npz")["values"][:3]
    np.testing.assert_allclose(rows[:, :3], expected[:, :3], rtol=1e-3)
    np.testing.assert_allclose(rows[:, 3], expected[:, 3], rtol=2e-3)


@pytest.mark.parametrize(
    ("config", "key"), [("deit/deit-ti_c100_base.yaml", "vt"), ("resnet/r-56_c100.yaml", "cnn")]
)
def test_learning_rates_are_the_published_ones(config: str, key: str) -> None:
    schedule = builders.build_learning_rate(lg.load_config(CONFIGS / config))
    expected = np.load(REFERENCE / "lr_schedules.npz")[key]
    np.testing.assert_allclose([schedule.at(e) for e in range(300)], expected, rtol=1e-6)


@pytest.mark.parametrize("config", ["deit/deit-ti_c100_base.yaml", "resnet/r-56_c100.yaml"])
def test_parameter_groups_are_the_published_ones(config: str) -> None:
    cfg = lg.load_config(CONFIGS / config, ["OPTIM.HEAD_LR_RATIO", "3.0"])
    guided, _, _ = lg.build_guided(cfg)
    optimizer = builders.build_optimizer(cfg, guided)
    groups = {
        g["name"]: sorted(
            published_name(guided.student, n.removeprefix("student.")) for n in g["parameter_names"]
        )
        for g in optimizer.param_groups
    }
    assert groups == json.loads((REFERENCE / "param_groups.json").read_text())[Path(config).stem]
    decay = {g["name"]: g["weight_decay"] for g in optimizer.param_groups}
    assert decay["head_decay"] == decay["body_decay"] == cfg.OPTIM.WEIGHT_DECAY
    assert decay["head_no_decay"] == decay["body_no_decay"] == 0
    builders.build_learning_rate(cfg).apply(optimizer, 30)
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert rates["head_decay"] == pytest.approx(3 * rates["body_decay"])


def test_projection_heads_are_in_the_body_and_their_biases_not_decayed() -> None:
    cfg, guided, _, _ = build(GUIDED)
    optimizer = builders.build_optimizer(cfg, guided)
    where = {n: g["name"] for g in optimizer.param_groups for n in g["parameter_names"]}
    assert [where[f"heads.{i}.weight"] for i in range(3)] == ["body_decay"] * 3
    assert [where[f"heads.{i}.bias"] for i in range(3)] == ["body_no_decay"] * 3
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len([*guided.parameters()])
