"""DeiT and the CNNs against what the original research code computes with the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lg.models import (
    Backbone,
    deit,
    feature_maps,
    load_published_state_dict,
    published_state_dict,
    resnet,
)
from tests.reference_fill import fill, reference_input

REFERENCE = Path(__file__).parents[1] / "reference"
DEIT_TINY = {
    "img_size": 224,
    "num_classes": 100,
    "patch_size": 16,
    "hidden_dim": 192,
    "depth": 12,
    "num_heads": 3,
    "mlp_ratio": 4,
}
# numbers, keys, image size, model
CASES: dict[str, tuple[str, int, Callable[[], Backbone]]] = {
    "deit-ti_c100_ours": ("deit-ti_c100_base", 224, lambda: deit(**DEIT_TINY)),
    "deit-ti_c100_ours_logit": (
        "deit-ti_c100_ours_logit",
        224,
        lambda: deit(**DEIT_TINY, distilled=True),
    ),
    "r-18_c100": ("r-18_c100", 224, lambda: resnet(depth=18, img_size=224, num_classes=100)),
    "r-56_c100": ("r-56_c100", 32, lambda: resnet(depth=56, img_size=32, num_classes=100)),
}


def read_keys(name: str) -> dict[str, list[int]]:
    return json.loads((REFERENCE / f"{name}.keys.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_keys_shapes_and_order_are_the_published_ones(name: str) -> None:
    keys, _, build = CASES[name]
    state = published_state_dict(build())
    assert [(key, list(tensor.shape)) for key, tensor in state.items()] == [
        *read_keys(keys).items()
    ]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_features_are_the_published_ones(name: str) -> None:
    keys, size, build = CASES[name]
    numbers = np.load(REFERENCE / f"{name}.npz")
    model = build().eval()
    load_published_state_dict(model, fill(read_keys(keys)))
    with torch.no_grad():
        logits, maps = feature_maps(model, reference_input(size), range(len(model.blocks)))
    np.testing.assert_allclose(logits.numpy(), numbers["logits"], rtol=0, atol=1e-4)
    assert len(maps) == sum(key.endswith("_slice") for key in numbers.files)
    for index, feature in enumerate(maps):
        assert list(feature.shape) == numbers[f"feature_{index:02d}_shape"].tolist()
        assert feature.shape[1] == model.feature_dims[index]
        spread = [feature.mean().item(), feature.std(correction=0).item()]
        np.testing.assert_allclose(
            spread, numbers[f"feature_{index:02d}_mean_std"], rtol=0, atol=1e-4
        )
        np.testing.assert_allclose(
            feature[:, :4, :3, :3], numbers[f"feature_{index:02d}_slice"], rtol=0, atol=1e-4
        )
