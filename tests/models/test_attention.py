"""Attention maps: equal to the weights the blocks apply, without changing the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lg
from lg.builders import place_model
from lg.device import Precision
from lg.models import Backbone, MapLayout, resnet, timm_model
from lg.models.layers import attend
from tests.models.test_families import SMALL, build

# family -> (heads, queries, keys) of each block at 32 pixels
SHAPES = {
    "t2t": [(2, 5, 5)] * 3,
    "pit": [(1, 50, 50), (1, 50, 50), (2, 17, 17)],
    "pvt": [(1, 64, 4), (1, 64, 4), (2, 17, 17)],
    "pvtv2": [(1, 64, 4), (1, 64, 4), (2, 16, 4)],
    "convit": [(2, 16, 16), (2, 16, 16), (2, 17, 17)],
    "cvt": [(1, 64, 16), (1, 64, 16), (2, 17, 5)],
}


@pytest.mark.parametrize("name", SMALL)
def test_weights_of_each_query_sum_to_one(name: str) -> None:
    model, images = build(name), torch.randn(2, 3, 32, 32)
    maps = [lg.attention_maps(model, images, index) for index in range(3)]
    assert [tuple(m.shape[1:]) for m in maps] == SHAPES[name]
    for weights in maps:
        assert len(weights) == 2 and weights.min() >= 0 and not weights.requires_grad
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("index", [0, 2])
def test_weights_reproduce_the_attended_values(name: str, index: int) -> None:
    torch.manual_seed(0)
    model, images = build(name).eval(), torch.randn(2, 3, 32, 32)
    layer = model.blocks[index].attn
    for parameter in layer.parameters():  # a fresh model has nearly uniform attention
        nn.init.normal_(parameter, std=0.3)
    kept: dict[str, torch.Tensor] = {}
    values, output = _value_layer(layer)
    values.register_forward_hook(lambda _m, _i, out: kept.update(values=out))
    output.register_forward_hook(lambda _m, inputs, _o: kept.update(attended=inputs[0]))
    weights = lg.attention_maps(model, images, index)
    width = kept["attended"].shape[2]
    heads = kept["values"][..., -width:].unflatten(2, (weights.shape[1], -1)).transpose(1, 2)
    expected = (weights @ heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(kept["attended"], expected, rtol=1e-4, atol=1e-5)


def _value_layer(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the layer whose (last) outputs are the values, and the layer after the attention."""
    names = ("v", "proj_v", "kv", "qkv")
    return next(getattr(layer, n) for n in names if hasattr(layer, n)), layer.proj


def test_reading_attention_does_not_change_the_model() -> None:
    model = build("cvt", drop_path_rate=[0.0, 0.5])
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(*(lg.attention_maps(model, images, 2) for _ in range(2)))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        lg.attention_maps(model, torch.randn(2, 5, 32, 32), 2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_unfused_timm_attention() -> None:
    model = timm_model("levit_128s", img_size=64, in_channels=3, num_classes=4)
    weights = lg.attention_maps(model, torch.randn(1, 3, 64, 64), 0)
    assert weights.shape == (1, 4, 16, 16)


def test_gated_attention_of_timm_is_mixed() -> None:
    model = timm_model("convit_tiny", img_size=64, in_channels=3, num_classes=4).eval()
    kept: list[torch.Tensor] = []
    layer = model.blocks[0].attn
    layer.register_forward_hook(lambda _m, inputs, _o: kept.append(inputs[0]))
    weights = lg.attention_maps(model, torch.randn(1, 3, 64, 64), 0)
    torch.testing.assert_close(weights, layer.get_attention(kept[0]))


def test_other_softmaxes_are_ignored() -> None:
    model = timm_model("resnest14d", img_size=64, in_channels=3, num_classes=4)
    with pytest.raises(ValueError, match="no softmax attention"):
        lg.attention_maps(model, torch.randn(1, 3, 64, 64), 0)


def test_attention_bias_is_included() -> None:
    class Biased(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            split = tokens.unsqueeze(1)
            bias = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
            out = nn.functional.scaled_dot_product_attention(split, split, split, attn_mask=bias)
            return out.squeeze(1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Biased()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.block(images.flatten(2).transpose(1, 2))

    layout = MapLayout("tokens", 3, 0, (1, 2))
    model = Backbone(Net(), family="timm", block_names=["block"], layouts=[layout])
    weights = lg.attention_maps(model, torch.zeros(1, 3, 1, 2), 0)
    assert weights[0, 0].tolist() == [[1.0, 0.0], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("index", "message"), [(3, "index 3 is out of range"), (0, r"layer1\) .* no softmax attention")]
)
def test_errors_name_the_block(index: int, message: str) -> None:
    model = resnet(depth=8, img_size=32, num_classes=4)
    with pytest.raises(ValueError, match=message):
        lg.attention_maps(model, torch.zeros(1, 3, 32, 32), index)


def _forbid_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("fused attention was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)


@pytest.mark.parametrize("scale", [None, 0.2])
def test_bf16_attention_is_not_fused_on_cpus(
    scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 9, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    expected = attend(query, key, value, num_heads=4, drop_rate=0.0, scale=scale)
    _forbid_fused(monkeypatch)
    short = (tensor.bfloat16() for tensor in (query, key, value))
    found = attend(*short, num_heads=4, drop_rate=0.0, scale=scale)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    with pytest.raises(AssertionError, match="fused"):
        attend(query, key, value, num_heads=4, drop_rate=0.0, scale=scale)


@pytest.mark.parametrize("name", SMALL)
def test_models_in_bf16_do_without_fused_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, images = build(name).eval(), torch.randn(2, 3, 32, 32)
    precision = Precision(torch.device("cpu"), mixed=True, dtype="bf16")
    expected = model(images)
    place_model(model, precision)
    with monkeypatch.context() as patch, precision.autocast():
        _forbid_fused(patch)
        found = model(images)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    place_model(model, Precision(torch.device("cpu")))
    torch.testing.assert_close(model(images), expected)
