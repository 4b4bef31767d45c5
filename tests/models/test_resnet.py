"""Residual networks against a formula over the published keys."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from lg.models import feature_maps, load_published_state_dict, published_state_dict, resnet
from lg.models.layers import gains_from_channels_last
from tests.reference_fill import fill

SIZES = {"img_size": 32, "num_classes": 10}


def formula(
    state: dict[str, torch.Tensor],
    images: torch.Tensor,
    *,
    stride_1x1: bool,
    groups: int,
    eps: float,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return logits and the map of each stage of a ResNet in evaluation mode."""

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
        scale = state[f"{key}.weight"] / torch.sqrt(var + eps)
        return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{key}.bias"][
            :, None, None
        ]

    def conv(x: torch.Tensor, key: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = state[f"{key}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)

    imagenet = state["stem.conv.weight"].shape[-1] == 7
    x = torch.relu(norm(conv(images, "stem.conv", 2 if imagenet else 1), "stem.bn"))
    x = F.max_pool2d(x, 3, 2, 1) if imagenet else x
    maps = []
    stages = sorted({key.split(".")[0] for key in state if key[0] == "s" and key[1].isdigit()})
    for stage in stages:
        depth = len({key.split(".")[1] for key in state if key.startswith(f"{stage}.")})
        for block in (f"{stage}.b{number + 1}" for number in range(depth)):
            stride = 2 if stage != "s1" and block.endswith(".b1") else 1
            three = f"{block}.f.c.weight" in state
            strides = (stride, 1) if stride_1x1 or not three else (1, stride)
            y = torch.relu(norm(conv(x, f"{block}.f.a", strides[0]), f"{block}.f.a_bn"))
            y = norm(conv(y, f"{block}.f.b", strides[1], groups), f"{block}.f.b_bn")
            y = norm(conv(torch.relu(y), f"{block}.f.c"), f"{block}.f.c_bn") if three else y
            if f"{block}.proj.weight" in state:
                x = norm(conv(x, f"{block}.proj", stride), f"{block}.bn")
            x = torch.relu(x + y)
        maps.append(x)
    return x.mean((2, 3)) @ state["head.fc.weight"].T + state["head.fc.bias"], maps


@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 50, **SIZES, "stride_1x1": True},
        {"depth": 50, **SIZES, "stride_1x1": False, "bn_eps": 0.5},
        {"depth": 50, **SIZES, "num_groups": 4, "width_per_group": 4},
        {"depth": 34, "img_size": 32, "num_classes": 10},
        {"depth": 8, "img_size": 8, "num_classes": 10, "in_channels": 1},
    ],
    ids=["stride-1x1", "stride-3x3", "groups", "34", "cifar-8"],
)
def test_logits_and_stages_follow_the_formula(settings: dict) -> None:
    model = resnet(**settings).eval()
    state = fill({key: value.shape for key, value in published_state_dict(model).items()})
    load_published_state_dict(model, state)
    images = torch.randn(
        2,
        settings.get("in_channels", 3),
        settings["img_size"],
        settings["img_size"],
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        logits, maps = feature_maps(model, images, range(len(model.blocks)))
    expected, expected_maps = formula(
        state,
        images,
        stride_1x1=settings.get("stride_1x1", True),
        groups=settings.get("num_groups", 1),
        eps=settings.get("bn_eps", 1e-5),
    )
    scale = expected.abs().max()
    torch.testing.assert_close(logits / scale, expected / scale, rtol=0, atol=1e-4)
    for mine, theirs in zip(maps, expected_maps, strict=True):
        torch.testing.assert_close(mine / theirs.max(), theirs / theirs.max(), rtol=0, atol=1e-4)


def test_grouped_widths_equal_resnext() -> None:
    # ResNeXt-50 32x4d: 25.03 M parameters with 1000 classes (arXiv 1611.05431, table 1).
    settings = {**SIZES, "num_classes": 1000}
    model = resnet(depth=50, **settings, num_groups=32, width_per_group=4)
    assert sum(p.numel() for p in model.parameters()) == 25_028_904
    shapes = {k: v.shape for k, v in published_state_dict(model).items()}
    assert shapes["s1.b1.f.b.weight"] == (128, 4, 3, 3)
    assert shapes["s4.b1.f.b.weight"] == (1024, 32, 3, 3)


@pytest.mark.parametrize(("depth", "blocks"), [(8, 1), (14, 2), (44, 7), (110, 18)])
def test_cifar_depths(depth: int, blocks: int) -> None:
    model = resnet(depth=depth, img_size=32, num_classes=10)
    assert [len(stage) for stage in model.blocks] == [blocks] * 3
    assert model.feature_dims == [16, 32, 64]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == depth - 1 + 2  # without the classifier, with two shortcuts


@pytest.mark.parametrize(
    ("depth", "blocks", "dims"),
    [
        (34, [3, 4, 6, 3], [64, 128, 256, 512]),
        (101, [3, 4, 23, 3], [256, 512, 1024, 2048]),
        (152, [3, 8, 36, 3], [256, 512, 1024, 2048]),
    ],
)
def test_imagenet_depths(depth: int, blocks: list[int], dims: list[int]) -> None:
    with torch.device("meta"):
        model = resnet(depth=depth, img_size=224, num_classes=10)
    assert [len(stage) for stage in model.blocks] == blocks
    assert model.feature_dims == dims


def test_initial_weights() -> None:
    torch.manual_seed(0)
    for settings in (
        {"depth": 50, **SIZES},
        {"depth": 20, "img_size": 32, "num_classes": 100},
    ):
        model = resnet(**settings)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                std = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
                assert module.weight.std().item() == pytest.approx(std, rel=0.1)
                assert abs(module.weight.mean().item()) < 0.1 * std
            if isinstance(module, nn.BatchNorm2d):
                assert torch.all(module.weight == 1) and torch.all(module.bias == 0)
        assert model.net.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert torch.all(model.net.fc.bias == 0)


def test_settings_reach_the_layers() -> None:
    model = resnet(
        depth=14,
        img_size=32,
        num_classes=10,
        bn_eps=1e-3,
        bn_momentum=0.3,
        zero_init_final_bn_gamma=True,
        activation="leaky_relu",
        activation_inplace=False,
    )
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.3)}
    assert sum(bool(torch.all(norm.weight == 0)) for norm in norms) == 6
    activations = [m for m in model.modules() if isinstance(m, nn.LeakyReLU)]
    assert len(activations) == 13 and not any(m.inplace for m in activations)
    plain = resnet(depth=8, img_size=32, num_classes=2)
    assert {m.inplace for m in plain.modules() if isinstance(m, nn.ReLU)} == {True}


@pytest.mark.parametrize(
    ("name", "gains"),
    [("r-56", True), ("efficientnet_b0", True), ("r-18", False), ("vit_tiny_patch16_224", False)],
)
def test_channels_last_is_for_narrow_cnns(name: str, gains: bool) -> None:
    if name.startswith("r-"):
        net: nn.Module = resnet(depth=int(name[2:]), img_size=32, num_classes=10)
    else:
        net = timm.create_model(name)
    assert gains_from_channels_last(net) is gains
