"""`--mode info`: what it measures and prints, and that it needs no data and no weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lg
from lg.errors import ConfigError
from lg.models import resnet, timm_model
from lg.tools.info import BlockRow, ModelFacts, describe, describe_config, measure_model
from tests.models.test_families import build

ROOT = Path(__file__).parents[2]


def test_a_model_is_measured_and_left_as_it_was() -> None:
    model = build("cvt", in_channels=1)
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    facts = measure_model(model, image_size=32, in_channels=1)
    assert facts.params == sum(p.numel() for p in model.parameters())
    assert facts.blocks[2] == BlockRow(2, "stages.1.blocks.0", 32, 4, 4)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)


def test_multiply_adds_are_counted_by_hand() -> None:
    facts = measure_model(resnet(depth=8, img_size=8, num_classes=10), image_size=8, in_channels=3)
    first = 64 * 16 * (27 + 2 * 144)  # 64 positions, 16 channels of 3 x 3 windows
    second = 16 * 32 * (144 + 288 + 16)  # a quarter of the positions; 1 x 1 shortcut
    third = 4 * 64 * (288 + 576 + 32)
    assert facts.macs == first + second + third + 64 * 10


def test_lines_of_a_guided_config() -> None:
    lines = describe_config(lg.load_config(ROOT / "configs/pvt/pvt-ti_c100_ours.yaml"))
    assert lines[:3] == [
        "PVT, images of 224 x 224, 100 classes: 12,767,588 parameters, 1.932 GMACs per image",
        "Guide ResNet-56, images of 32 x 32: 861,620 parameters, 0.126 GMACs per image",
        "Projection heads: 38,000 parameters, trained, not part of the weights",
    ]
    assert lines[4].split() == ["block", "module", "channels", "map", "imitates"]
    assert " ".join(lines[5].split()) == (
        "0 stages.0.blocks.0 64 56 x 56 0 layer1: 16 channels, 32 x 32, compared at 56 x 56"
    )
    assert " ".join(lines[12].split()) == (
        "7 stages.3.blocks.1 512 7 x 7 2 layer3: 64 channels, 8 x 8, compared at 8 x 8"
    )
    assert len(lines) == 13 and all(line == line.rstrip() and len(line) <= 100 for line in lines)


def test_fixed_parameters_are_listed() -> None:
    lines = describe_config(lg.load_config(ROOT / "configs/t2t/t2t-7_c100_base.yaml"))
    # Fixed: positions of 196 patches and the class token, 256 wide, and two random projections.
    assert 54_528 == 197 * 256 + 2 * 32 * 64
    assert "100 classes: 4,078,922 parameters (54,528 fixed), " in lines[0]
    assert len(lines[0]) <= 100


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        # One convolution from 192 channels to each stage, and 3 x 12 weights.
        ("deit/deit-ti_c100_ours", 193 * (16 + 32 + 64) + 3 * 12),
        # One convolution from each block to all stages, and 3 x 8 weights.
        ("pvt/pvt-ti_c100_ours", 2 * (65 + 129 + 321 + 513) * (16 + 32 + 64) + 3 * 8),
    ],
)
def test_lines_of_a_mixture(config: str, heads: int) -> None:
    opts = ["DISTILLATION.INTER_STUDENT_INDEX", "mix"]
    lines = describe_config(lg.load_config(ROOT / f"configs/{config}.yaml", opts))
    assert lines[2:4] == [
        f"Projection heads: {heads:,} parameters, trained, not part of the weights",
        "A learned mixture of all blocks imitates each of the guide's 0 layer1, 1 layer2, 2 layer3",
    ]
    assert not any("compared at" in line or line.endswith("imitates") for line in lines)


def test_attention_has_no_projection_heads() -> None:
    cfg = lg.load_config(
        ROOT / "configs/digits/vit_digits_ours.yaml", ["DISTILLATION.INTER_TRANSFORM", "attention"]
    )
    assert not any("heads" in line for line in describe_config(cfg))


def test_a_plain_model_has_no_guide() -> None:
    facts = ModelFacts(5, 2_000_000, 8, [BlockRow(0, "layer1", 3, 4, 5)])
    assert describe("ResNet", facts, num_classes=2) == [
        "ResNet, images of 8 x 8, 2 classes: 5 parameters, 0.002 GMACs per image",
        "",
        "  block  module  channels  map",
        "      0  layer1         3  4 x 5",
    ]


@pytest.mark.parametrize(
    ("name", "size", "last"),
    [("mixer_s32_224", 64, (512, 2, 2)), ("levit_128s", 128, (384, 2, 2))],
)
def test_timm_models_are_measured(name: str, size: int, last: tuple[int, int, int]) -> None:
    model = timm_model(name, img_size=size, in_channels=3, num_classes=4)
    row = measure_model(model, image_size=size, in_channels=3).blocks[-1]
    assert (row.channels, row.height, row.width) == last


def test_the_command_needs_no_data_and_prints_once(tmp_path: Path) -> None:
    config = ROOT / "configs/digits/vit_digits_ours.yaml"
    command = [sys.executable, str(ROOT / "run_net.py"), "--mode", "info", "--cfg", str(config)]
    run = subprocess.run(
        [*command, "NUM_GPUS", "2"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
    assert run.stdout.splitlines() == describe_config(lg.load_config(config))
    assert not [*tmp_path.iterdir()]


def test_a_missing_tap_is_rejected() -> None:
    cfg = lg.load_config(
        ROOT / "configs/digits/vit_digits_ours.yaml",
        ["DISTILLATION.INTER_STUDENT_INDEX", "[0,3,6]"],
    )
    with pytest.raises(ConfigError, match="6 blocks, numbered 0 to 5"):
        describe_config(cfg)
