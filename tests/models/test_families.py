"""The transformer families: settings reach their layers, sizes that fit build."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import lg
from lg.errors import CheckpointError
from lg.models import Backbone, convit, cvt, feature_maps, pit, pvt, pvtv2, t2t
from lg.models.convit import GatedAttention
from lg.models.t2t import PerformerAttention, sinusoid

PLAIN = {"hidden_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 3.0}
PYRAMID = {"hidden_dim": [16, 32], "depth": [2, 1], "num_heads": [1, 2]}
CVT_STAGES = {
    "with_cls_token": [False, True],
    "qkv_proj_method": ["dw_bn", "dw_bn"],
    "kernel_qkv": [3, 3],
    "stride_kv": [2, 2],
    "stride_q": [1, 1],
    "padding_kv": [1, 1],
    "padding_q": [1, 1],
}
# builder, arguments of a small model at 32 pixels, (channels, side) of each block's map
SMALL: dict[str, tuple[Any, dict[str, Any], list[tuple[int, int]]]] = {
    "t2t": (t2t, PLAIN, [(32, 2)] * 3),
    "pit": (
        pit,
        {**PYRAMID, "patch_size": 8, "stride": 4, "mlp_ratio": 3.0},
        [(16, 7), (16, 7), (32, 4)],
    ),
    "pvt": (
        pvt,
        {**PYRAMID, "patch_size": [4, 2], "mlp_ratio": [3.0, 2.0], "sr_ratio": [4, 1]},
        [(16, 8), (16, 8), (32, 4)],
    ),
    "pvtv2": (
        pvtv2,
        {
            **PYRAMID,
            "patch_size": [5, 3],
            "patch_stride": [4, 2],
            "mlp_ratio": [3.0, 2.0],
            "sr_ratio": [4, 2],
        },
        [(16, 8), (16, 8), (32, 4)],
    ),
    "convit": (convit, {**PLAIN, "patch_size": 8, "local_layers": 2}, [(32, 4)] * 3),
    "cvt": (
        cvt,
        {
            **PYRAMID,
            **CVT_STAGES,
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [2, 1],
            "mlp_ratio": [3.0, 2.0],
            "drop_rate": [0.0, 0.0],
            "drop_path_rate": [0.0, 0.0],
            "attention_drop_rate": [0.0, 0.0],
        },
        [(16, 8), (16, 8), (32, 4)],
    ),
}


def build(name: str, **changes: Any) -> Backbone:
    builder, settings, _ = SMALL[name]
    return builder(**{"img_size": 32, "num_classes": 10, **settings, **changes})


def rates(name: str, drop: float, path: float, attention: float) -> dict[str, Any]:
    """Return the three rates in the form that a family takes."""
    values = {"drop_rate": drop, "drop_path_rate": path, "attention_drop_rate": attention}
    return {k: [v, v] for k, v in values.items()} if name == "cvt" else values


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_maps_have_the_sizes_of_their_layouts(name: str, in_channels: int) -> None:
    model = build(name, in_channels=in_channels).eval()
    images = torch.randn(2, in_channels, 32, 32)
    with torch.no_grad():
        logits, maps = feature_maps(model, images, range(3))
    assert logits.shape == (2, 10)
    assert [(m.shape[1], m.shape[2]) for m in maps] == SMALL[name][2]
    assert all(m.shape[2] == m.shape[3] for m in maps)
    assert model.feature_dims == [channels for channels, _ in SMALL[name][2]]


@pytest.mark.parametrize(
    ("name", "size", "side"),
    # T2T, PVTv2 and CvT pad such images; PiT ignores a border.
    [
        ("t2t", 41, 3),
        ("pit", 37, 4),
        ("pvt", 64, 8),
        ("pvtv2", 37, 5),
        ("convit", 64, 8),
        ("cvt", 45, 6),
    ],
)
def test_other_image_sizes(name: str, size: int, side: int) -> None:
    model = build(name, img_size=size).eval()
    _, maps = feature_maps(model, torch.randn(1, 3, size, size), [2])
    assert maps[0].shape[2:] == (side, side)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_trained_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    logits, maps = feature_maps(model, torch.randn(4, 3, 32, 32), [2])
    (logits.square().sum() + maps[0].square().sum()).backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not still
    frozen = {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"pos_embed", "w"} if name == "t2t" else set())


@pytest.mark.parametrize("name", SMALL)
def test_rates_reach_every_block(name: str) -> None:
    net = build(name, **rates(name, 0.1, 0.3, 0.2)).net
    drops = {
        m.p for n, m in net.named_modules() if isinstance(m, nn.Dropout) and "attn_drop" not in n
    }
    # Dropout before the head, in timm's networks, stays off.
    assert 0.1 in drops and drops <= {0.0, 0.1}
    attention = [m for n, m in net.named_modules() if n.endswith("attn")]
    seen = [getattr(m, "attention_drop_rate", None) or m.attn_drop.p for m in attention[-3:]]
    assert seen == [0.2] * 3
    paths = {n: m.drop_prob for n, m in net.named_modules() if type(m).__name__ == "DropPath"}
    own_ramps = {"pit": 0.2, "cvt": 0.0}  # i / n; one ramp per stage, and the last has one block
    assert paths.get(max(paths)) == pytest.approx(own_ramps.get(name, 0.3))


@pytest.mark.parametrize("name", SMALL)
def test_the_epsilon_reaches_every_norm(name: str) -> None:
    norms = [m.eps for m in build(name, ln_eps=1e-3).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) >= 7 and set(norms) == {1e-3}


@pytest.mark.parametrize("name", ["t2t", "pvt", "pvtv2", "convit", "cvt"])
def test_initial_weights_are_small_and_biases_zero(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, num_classes=400)
    assert model.net.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None and module.in_features > 3:
            assert not module.bias.any()


def test_pyramids_have_an_mlp_width_per_stage() -> None:
    for name in ("pvt", "pvtv2", "cvt"):
        stages = build(name).net.stages
        assert [s.blocks[0].mlp.fc1.out_features for s in stages] == [48, 64]


@pytest.mark.parametrize("name", SMALL)
def test_a_published_file_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = [lg.published_state_dict(build(name)) for _ in range(2)]
    file = {
        "epoch": 3,
        "test_err": np.float64(40.0),  # the average has the lower error
        "ema_err": np.float64(30.0),
        "model_state": states[0],
        "ema_state": states[1],
        "optimizer_state": {"state": {}, "param_groups": []},
        "cfg": "MODEL: {}",
    }
    torch.save(file, tmp_path / "model.pyth")
    model = build(name)
    lg.load_weights(model, tmp_path / "model.pyth")
    loaded = lg.published_state_dict(model)
    assert list(loaded) == list(states[1])
    assert all(torch.equal(loaded[key], value) for key, value in states[1].items())
    lg.load_published_state_dict(model, states[0])
    assert all(torch.equal(states[0][k], v) for k, v in lg.published_state_dict(model).items())
    del file["ema_state"][next(iter(loaded))]
    torch.save(file, tmp_path / "model.pyth")
    with pytest.raises(CheckpointError, match=f"1 missing: {next(iter(loaded))}"):
        lg.load_weights(model, tmp_path / "model.pyth")


# --- T2T ---------------------------------------------------------------------------------------


def test_fixed_positions_are_sines_and_cosines() -> None:
    table = sinusoid(5, 6)
    assert table.shape == (1, 5, 6)
    for place, channel, function in ((3, 0, math.sin), (3, 3, math.cos), (4, 4, math.sin)):
        angle = place / 10000 ** (2 * (channel // 2) / 6)
        assert table[0, place, channel].item() == pytest.approx(function(angle), abs=1e-6)


def test_random_features_estimate_softmax_attention() -> None:
    torch.manual_seed(0)
    layer = PerformerAttention(8, 8)
    layer.w = nn.Parameter(torch.randn(50_000, 8))  # many features for a good estimate
    layer.projection.weight.data = torch.eye(8)
    nn.init.zeros_(layer.projection.bias)
    tokens = torch.randn(1, 6, 8) / 2
    key, query, value = layer.qkv_transform(tokens).chunk(3, dim=-1)
    expected = value + (query @ key.transpose(1, 2)).softmax(dim=-1) @ value
    torch.testing.assert_close(layer(tokens), expected, rtol=0, atol=0.02)


def test_random_features_are_orthogonal_and_of_equal_length() -> None:
    gram = (lambda w: w @ w.T)(PerformerAttention(8, 64).w)
    torch.testing.assert_close(gram, 32.0 * torch.eye(32), rtol=0, atol=1e-4)


def test_the_performer_computes_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer = PerformerAttention(16, 16)
    tokens = 3 * torch.randn(2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(tokens)
    assert torch.isfinite(mixed).all()
    assert (mixed.float() - layer(tokens)).abs().max() < 0.1


def test_soft_splits_follow_their_settings() -> None:
    model = build("t2t", kernel_size=[3, 3], stride=[2, 2], padding=[1, 1], token_dim=16)
    module = model.net.t2t_module
    assert module.sides == [16, 8]
    assert [a.attn.qkv_transform.in_features for a in module.attention] == [27]
    assert module.projection.in_features == 16 * 9


# --- ConViT ------------------------------------------------------------------------------------


def timms_convit() -> nn.Module:
    return timm.models.convit.ConVit(
        img_size=32,
        patch_size=8,
        num_classes=10,
        embed_dim=16,
        depth=3,
        num_heads=2,
        mlp_ratio=3.0,
        local_up_to_layer=2,
    )


def test_gated_attention_equals_timm_with_gradients() -> None:
    torch.manual_seed(0)
    theirs, mine = timms_convit(), build("convit")
    mine.net.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    outputs = [model(images) for model in (theirs, mine)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    grads = dict(theirs.named_parameters())
    for name, parameter in mine.net.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, rtol=1e-4, atol=1e-5)


def test_mixing_results_equals_mixing_attentions() -> None:
    torch.manual_seed(0)
    layer = build("convit").net.blocks[0].attn
    nn.init.normal_(layer.gating_param)
    tokens = torch.randn(3, 16, 32)
    value = torch.randn(3, 2, 16, 16)
    mixed = layer.get_attention(tokens) @ value
    torch.testing.assert_close(layer.mix_results(tokens, value), mixed, rtol=0, atol=1e-6)


def test_gated_attention_applies_dropout_to_the_mixture() -> None:
    torch.manual_seed(0)
    layer = build("convit", attention_drop_rate=0.5).net.blocks[0].attn
    tokens = torch.randn(1, 16, 32)
    expected = layer.eval()(tokens)
    layer.train()
    mean = torch.stack([layer(tokens) for _ in range(4000)]).mean(0)
    assert not torch.equal(layer(tokens), expected)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.05)


def test_gated_heads_start_as_positions_of_a_kernel() -> None:
    layer = build("convit", num_heads=9, hidden_dim=72).net.blocks[0].attn
    assert isinstance(layer, GatedAttention)
    centre = 5  # row 1, column 1 of the 4 x 4 map
    looked_at = layer._positional()[:, centre].argmax(dim=1).tolist()
    assert looked_at == [centre + 4 * row + column for column in (-1, 0, 1) for row in (-1, 0, 1)]


# --- CvT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kernel", "padding", "keys"),
    # of an 8 x 8 map, with stride 2; pooling rounds up, the convolution rounds down
    [("dw_bn", 3, 1, 4 * 4), ("dw_bn", 3, 0, 3 * 3), ("avg", 3, 0, 4 * 4), ("linear", 3, 1, 8 * 8)],
)
def test_cvt_projections(method: str, kernel: int, padding: int, keys: int) -> None:
    methods = {"qkv_proj_method": [method, "dw_bn"], "kernel_qkv": [kernel, 3]}
    model = build("cvt", **methods, padding_kv=[padding, 1]).eval()
    seen: dict[str, int] = {}
    layer = model.net.stages[0].blocks[0].attn
    for name in ("proj_q", "proj_k", "proj_v"):
        getattr(layer, name).register_forward_hook(
            lambda _m, inputs, _o, name=name: seen.update({name: inputs[0].shape[1]})
        )
    model(torch.randn(1, 3, 32, 32))
    assert seen == {"proj_q": 64, "proj_k": keys, "proj_v": keys}


def test_cvt_without_a_class_token_averages_the_patches() -> None:
    torch.manual_seed(0)
    model = build("cvt", with_cls_token=[True, False]).eval()
    logits, maps = feature_maps(model, torch.randn(2, 3, 32, 32), [0, 2])
    assert [layout.prefix for layout in model.layouts] == [1, 1, 0]
    tokens = maps[1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(logits, model.net.head(model.net.norm(tokens).mean(1)))


def test_cvt_scales_by_the_full_width() -> None:
    assert [s.blocks[0].attn.scale for s in build("cvt").net.stages] == [16**-0.5, 32**-0.5]


# --- Sizes that do not fit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t2t", {"hidden_dim": 33}, "hidden_dim 33 is not divisible by num_heads 2"),
        ("t2t", {"patch_size": 8}, r"patch_size is 8, but stride \[4, 2, 2\] steps 16 pixels"),
        ("t2t", {"stride": [4, 2]}, "stride .* differ in length"),
        ("t2t", {"img_size": 2}, "img_size 2 is too small: .* use an image size of 3 or more"),
        ("pit", {"hidden_dim": [16, 24]}, r"hidden_dim is \[16, 24\]: .* makes 24 channels of 16"),
        ("pit", {"img_size": 7}, "img_size 7 is too small: .* 8 or more"),
        ("pvt", {"img_size": 36}, r"img_size 36 is not a multiple of 8, .* such as 32 or 40"),
        (
            "pvt",
            {"sr_ratio": [4, 2]},
            r"sr_ratio is \[4, 2\]: the last stage holds the class",
        ),
        (
            "pvt",
            {"sr_ratio": [16, 1]},
            r"too small for sr_ratio \[16, 1\]: .* 8 x 8, 4 x 4; .* 64 or more",
        ),
        ("pvt", {"num_heads": [1, 3]}, "hidden_dim 32 is not divisible by num_heads 3"),
        ("pvtv2", {"patch_size": [4, 3]}, "patch_size 4 does not overlap at patch_stride 4"),
        ("pvtv2", {"sr_ratio": [16, 1]}, r"maps of 8 x 8, 4 x 4; .* size of 61 or more"),
        (
            "convit",
            {"local_layers": 3},
            "local_layers is 3 with depth 3: .* use 2 or less",
        ),
        ("convit", {"img_size": 30}, "img_size 30 is not a multiple of patch_size 8: .* 24 or 32"),
        ("cvt", {"stride_q": [2, 1]}, "turn 8 x 8 queries into 4 x 4"),
        ("cvt", {"padding_q": [0, 1]}, "turn 8 x 8 queries into 6 x 6"),
        ("cvt", {"img_size": 2}, "img_size 2 is too small: .* use an image size of 3 or more"),
        (
            "cvt",
            {"kernel_qkv": [11, 3], "padding_q": [5, 1], "padding_kv": [0, 1]},
            "kernel_qkv 11 does not fit the 8 x 8 map",
        ),
    ],
)
def test_errors_name_the_argument_and_the_fix(name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **changes)


def test_the_image_size_in_the_error_is_the_smallest_that_works() -> None:
    assert build("t2t", img_size=3).eval()(torch.randn(1, 3, 3, 3)).shape == (1, 10)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_is_close_to_full_precision(name: str) -> None:
    torch.manual_seed(0)
    model, images = build(name), torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    mixed.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    full = model(images)
    assert (mixed - full).abs().max() < 0.03 * full.abs().max() + 0.005
