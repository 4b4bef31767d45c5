"""Learning rates and parameter groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lg
from benchmarks.parity import REFERENCE, build
from lg import builders

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
