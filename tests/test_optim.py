"""Learning rates and parameter groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lg
from benchmarks.parity import REFERENCE, build
from lg import builders
from lg.optim import WeightAverage

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("config", "key"), [("deit/deit-ti_c100_base.yaml", "vt"), ("resnet/r-56_c100.yaml", "cnn")]
)
def test_learning_rates_are_the_published_ones(config: str, key: str) -> None:
    schedule = builders.build_learning_rate(lg.load_config(CONFIGS / config))
    expected = np.load(REFERENCE / "lr_schedules.npz")[key]
    np.testing.assert_allclose([schedule.at(e) for e in range(300)], expected, rtol=1e-6)


def test_groups_differ_in_decay_and_learning_rate() -> None:
    cfg, guided, _, _ = build("deit-ti", "base", "OPTIM.HEAD_LR_RATIO", "3.0")
    optimizer = builders.build_optimizer(cfg, guided)
    decay = {g["name"]: g["weight_decay"] for g in optimizer.param_groups}
    assert decay["head_decay"] == decay["body_decay"] == cfg.OPTIM.WEIGHT_DECAY == 0.05
    assert decay["head_no_decay"] == decay["body_no_decay"] == 0
    builders.build_learning_rate(cfg).apply(optimizer, 30)
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert rates["head_decay"] == pytest.approx(3 * rates["body_decay"])


def test_projection_heads_are_in_the_body_and_their_biases_not_decayed() -> None:
    cfg, guided, _, _ = build("deit-ti")
    optimizer = builders.build_optimizer(cfg, guided)
    where = {n: g["name"] for g in optimizer.param_groups for n in g["parameter_names"]}
    assert [where[f"heads.{i}.weight"] for i in range(3)] == ["body_decay"] * 3
    assert [where[f"heads.{i}.bias"] for i in range(3)] == ["body_no_decay"] * 3
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len([*guided.parameters()])


def test_weight_average_copies_while_warming_and_then_moves_by_its_step() -> None:
    model = nn.BatchNorm1d(3)
    average = WeightAverage(model, alpha=0.5, period=2, batch_size=30, max_epoch=100)
    values = []
    for step in range(6):
        with torch.no_grad():
            model.weight.fill_(step + 1.0)
            model.num_batches_tracked.add_(1)
        average.follow(model, step, warming=step < 3)
        values.append(average.module.weight[0].item())
    # The step is 0.5 * 30 / 100 * 2 = 0.3; updates are due after steps 0, 2 and 4.
    assert values == pytest.approx([1, 1, 3, 3, 3 + 0.3 * (5 - 3), 3.6])
    assert average.module.num_batches_tracked.item() == 5  # integers are copied
    assert WeightAverage(model, alpha=1.0, period=8, batch_size=30, max_epoch=100).decay == 0


@pytest.mark.parametrize("kind", ["muon", "nadamuon"])
def test_muon_orthogonalises_matrices_and_keeps_the_groups(kind: str) -> None:
    cfg, guided, _, _ = build("deit-ti", "base", "OPTIM.OPTIMIZER", kind)
    optimizer = builders.build_optimizer(cfg, guided)
    assert {g["name"] for g in optimizer.param_groups} == {
        f"{part}_{decay}" for part in ("head", "body") for decay in ("decay", "no_decay")
    }
    parameters = dict(guided.named_parameters())
    matrix = parameters["student.net.blocks.0.mlp.fc1.weight"]
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        matrix.copy_(torch.zeros_like(matrix))  # no decay in what is compared
    lr = builders.build_learning_rate(cfg).apply(optimizer, 30)
    optimizer.step()
    # A random gradient has singular values from 0.5 to 1.5 times their mean; Muon makes them equal.
    values = torch.linalg.svdvals(matrix.detach())
    assert (values.max() / values.min()) < (1.5 if kind == "muon" else 3)
    # timm scales the update to the size of AdamW's: a root mean square of 0.2 lr.
    assert matrix.square().mean().sqrt().item() == pytest.approx(0.2 * lr, rel=0.15)
    # The first step of AdamW has the size lr in every entry of a vector.
    bias = "student.net.blocks.0.mlp.fc1.bias"
    moved = (parameters[bias].detach() - before[bias]).abs()
    if kind == "muon":
        torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_position_tables_of_timm_models_are_not_decayed(kind: str) -> None:
    opts = ["MODEL.TYPE", "timm/swin_tiny_patch4_window7_224", "MODEL.IMG_SIZE", "64"]
    cfg = lg.load_config(CONFIGS / "timm/convnext-atto_flowers.yaml", opts)
    guided, _, _ = lg.build_guided(cfg)
    cfg.merge_from_list(["OPTIM.OPTIMIZER", kind])
    groups = builders.build_optimizer(cfg, guided).param_groups
    where = {name: group for group in groups for name in group["parameter_names"]}
    tables = [name for name in where if name.endswith("relative_position_bias_table")]
    assert len(tables) == 12 and all(where[name]["name"] == "body_no_decay" for name in tables)
    assert all(group["weight_decay"] == 0 for group in groups if group["name"] == "body_no_decay")
    if kind == "muon":
        flags = {group["name"]: group["use_fallback"] for group in groups}
        assert flags == {name: name.endswith("no_decay") for name in flags}
