"""Weights under published names: round trips and strict loading."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lg.models import (
    Backbone,
    deit,
    load_published_state_dict,
    published_state_dict,
    resnet,
    timm_model,
    unwrap,
)
from tests.reference_fill import fill


def small_deit(**changes: object) -> Backbone:
    settings = {
        "img_size": 32,
        "num_classes": 10,
        "patch_size": 8,
        "hidden_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2.0,
    }
    return deit(**{**settings, **changes})


BUILDERS = {
    "deit": small_deit,
    "distilled": lambda: small_deit(distilled=True, depth=1),
    "cifar": lambda: resnet(depth=8, img_size=32, num_classes=10),
    "bottleneck": lambda: resnet(depth=50, img_size=32, num_classes=10),
    "timm": lambda: timm_model("mobilenetv3_small_100", img_size=32, in_channels=3, num_classes=10),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_round_trip_is_bit_for_bit(name: str) -> None:
    source, target = BUILDERS[name](), BUILDERS[name]()
    weights = fill({key: value.shape for key, value in published_state_dict(source).items()})
    load_published_state_dict(source, weights)
    load_published_state_dict(target, published_state_dict(source))
    for mine, theirs in zip(
        source.state_dict().values(), target.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    returned = published_state_dict(target)
    assert all(torch.equal(returned[key], value) for key, value in weights.items())


def test_timm_models_keep_their_names_and_order() -> None:
    model = BUILDERS["timm"]()
    assert list(published_state_dict(model)) == list(model.net.state_dict())


def test_bottleneck_names() -> None:
    keys = list(published_state_dict(BUILDERS["bottleneck"]()))
    assert [k for k in keys if k.startswith("s2.b1.") and k.endswith("weight")] == [
        f"s2.b1.{part}.weight"
        for part in ("proj", "bn", "f.a", "f.a_bn", "f.b", "f.b_bn", "f.c", "f.c_bn")
    ]
    assert sum(key.endswith("proj.weight") for key in keys) == 4
    assert max(int(k.split(".")[1][1:]) for k in keys if k.startswith("s3.")) == 6


@pytest.mark.parametrize("name", BUILDERS)
def test_single_parameter_names_translate(name: str) -> None:
    model = BUILDERS[name]()
    state = published_state_dict(model)
    for own, parameter in model.named_parameters():
        name = model.keys.published(own.removeprefix("net."))
        assert state[name].data_ptr() == parameter.data_ptr()


def test_all_mismatches_are_reported_and_nothing_is_loaded() -> None:
    model = small_deit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = fill({key: value.shape for key, value in published_state_dict(model).items()})
    del weights["norm.bias"], weights["cls_token"]
    weights["head.weight"] = torch.zeros(7, 16)
    weights |= {f"layers.2.extra.{index}": torch.zeros(1) for index in range(8)}
    with pytest.raises(ValueError) as caught:
        load_published_state_dict(model, weights)
    message = str(caught.value)
    assert "2 missing: cls_token, norm.bias;" in message
    assert "8 unexpected: layers.2.extra.0, layers.2.extra.1," in message
    assert "layers.2.extra.7" not in message
    assert "1 of another shape: head.weight is [7, 16], the model has [10, 16]" in message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_values_other_than_tensors_are_rejected() -> None:
    model = small_deit()
    weights = {**published_state_dict(model), "norm.bias": "zero"}
    with pytest.raises(ValueError, match=r"norm.bias is a str, the model has \[16\]"):
        load_published_state_dict(model, weights)


def test_wrapped_models_give_the_same_names() -> None:
    model = small_deit()
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert list(published_state_dict(compiled)) == list(published_state_dict(model))
    with pytest.raises(ValueError, match="Linear is not a Backbone"):
        published_state_dict(nn.Linear(1, 1))
