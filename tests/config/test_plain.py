"""One file for the guided and the plain model; depths and lengths that a command changes."""

from __future__ import annotations

from pathlib import Path

import pytest

import lg
from lg.builders.guides import build_teacher
from lg.builders.models import same_depth, tap_indices
from lg.config import flatten
from lg.errors import ConfigError
from tests.config.config_cases import Write, fault

CONFIGS = Path(__file__).parents[2] / "configs"
OFF = ["DISTILLATION.ENABLE_INTER", "False"]


@pytest.mark.parametrize("name", ["digits/vit_digits", "deit/deit-ti_c100", "pvt/pvt-ti_c100"])
@pytest.mark.parametrize("kind", ["ours", "ours_offline"])
def test_a_guided_config_without_guidance_is_the_plain_one(name: str, kind: str) -> None:
    found = dict(flatten(lg.load_config(CONFIGS / f"{name}_{kind}.yaml", OFF)))
    plain = dict(flatten(lg.load_config(CONFIGS / f"{name}_base.yaml")))
    assert {key for key in plain if plain[key] != found[key]} == {"OUT_DIR"}


def test_guidance_is_switched_off_in_a_file_as_well(write: Write) -> None:
    base = CONFIGS / "digits/vit_digits_ours_offline.yaml"
    path = write(f"_BASE_: {base}\nDISTILLATION: {{ENABLE_INTER: False}}")
    assert not lg.load_config(path).DISTILLATION.OFFLINE
    # What the same file sets must have an effect.
    path = write(f"_BASE_: {base}\nDISTILLATION: {{ENABLE_INTER: False, OFFLINE: True}}")
    assert fault(path).startswith("DISTILLATION.OFFLINE is True")
    # The logits are still imitated.
    more = ["DISTILLATION.ENABLE_LOGIT", "True", "DISTILLATION.OFFLINE", "False"]
    cfg = lg.load_config(base, [*OFF, *more])
    assert cfg.DISTILLATION.TEACHER_WEIGHTS and cfg.CNN.DEPTH == 8


def test_a_resnet_keeps_its_sizes_without_guidance(write: Write) -> None:
    write("CNN: {DEPTH: 8}\nMODEL: {TYPE: ResNet}\nDISTILLATION: {TEACHER_IMG_SIZE: 16}", "a.yaml")
    cfg = lg.load_config(write("_BASE_: a.yaml"), OFF)
    assert cfg.CNN.DEPTH == 8 and cfg.DISTILLATION.TEACHER_IMG_SIZE == 32


def test_the_error_about_a_shallower_model_proposes_blocks() -> None:
    opts = ["TRANSFORMER.DEPTH", "6"]
    cfg = lg.load_config(CONFIGS / "deit/deit-ti_c100_ours.yaml", opts)
    student, teacher = lg.build_model(cfg), build_teacher(cfg, trained=False)
    with pytest.raises(ConfigError, match=r"use \[0, 3, 5\] for the same relative depth\.$"):
        tap_indices(cfg, student, teacher)
    assert same_depth([0, 6, 11], 12) == [0, 6, 11]
    assert same_depth([0, 6, 11], 3) == [0, 1, 2]
    assert same_depth([0, 6, 11], 2) == []  # three blocks of two
    assert same_depth([0], 4) == []


def test_the_error_about_a_long_warm_up_proposes_values() -> None:
    text = fault(CONFIGS / "deit/deit-ti_c100_base.yaml", "OPTIM.MAX_EPOCH", "15")
    assert "OPTIM.WARMUP_EPOCHS is 20" in text
    assert text.endswith("15: set it to 1 (a tenth of that), or OPTIM.MAX_EPOCH to 200.")
