"""Every architecture against the results of the published code with the same weights.

`benchmarks/parity.py` measures the differences and defines the limits.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import parity
from benchmarks.parity import LIMITS, MODELS, REFERENCE

# Every file of numbers must be compared, or missing models would go unnoticed.
STEPS = [(name, kind) for name in MODELS for kind in parity.step_kinds(name)]
LOSSES = [
    (name, transform)
    for name in MODELS
    if not name.startswith("r-")
    for transform in parity.transforms(name)
]


def test_every_recorded_number_is_used() -> None:
    forward = {f"{parity.stem(name)}.npz" for name in MODELS}
    steps = {f"{parity.stem(name, kind)}.trajectory.npz" for name, kind in STEPS}
    assert forward | steps | {"lr_schedules.npz"} == {p.name for p in REFERENCE.glob("*.npz")}
    assert len(LOSSES) == 3 * 9 - 1  # the published code has no similarity for PiT
    groups = {parity.stem(name, "base") for name in MODELS if parity.has_groups(name)}
    assert len(groups) == 9


@pytest.mark.parametrize("name", MODELS)
def test_keys_shapes_and_order_equal_the_published_code(name: str) -> None:
    assert parity.keys_equal(name)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_features_equal_the_published_code(name: str) -> None:
    logits, features = parity.forward_errors(name)
    assert logits <= LIMITS["logits"] and features <= LIMITS["features"]


@pytest.mark.parametrize(("name", "transform"), LOSSES)
def test_imitation_losses_equal_the_published_code(name: str, transform: str) -> None:
    assert parity.loss_error(name, transform) <= LIMITS["losses"]


@pytest.mark.parametrize(("name", "kind"), STEPS)
def test_first_steps_equal_the_published_code(name: str, kind: str) -> None:
    limit = LIMITS["steps of CNNs" if name.startswith("r-") else "steps"]
    assert parity.step_error(name, kind) <= limit


@pytest.mark.parametrize("name", [name for name in MODELS if parity.has_groups(name)])
def test_parameter_groups_equal_the_published_code(name: str) -> None:
    assert parity.groups_equal(name)


def test_a_difference_beyond_its_limit_fails(tmp_path: Path) -> None:
    row = parity.Parity("pvt-ti", 1, True, True, 1e-5, 1e-5, {"linear": 1e-5}, {"ours": 1e-4})
    assert row.holds()
    for change in (
        {"keys": False},
        {"groups": False},
        {"logits": 2e-4},
        {"features": 2e-4},
        {"losses": {"linear": 1e-5, "attention": 2e-4}},
        {"steps": {"base": 2e-3, "ours": 0.0}},
    ):
        assert not parity.Parity(**{**vars(row), **change}).holds()
    assert "DIFFER" in parity.line(parity.Parity(**{**vars(row), "keys": False}))
