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
