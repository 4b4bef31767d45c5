"""Generated configs: broken ones raise one line that names a key, valid ones build and train."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from yacs.config import CfgNode

import lg
from lg import builders
from lg.config import dump_config, flatten
from lg.config.defaults import DEFAULT_VALUES, DEFAULTS
from lg.config.rules import CHOICES, RANGES, accepted_types
from lg.distributed import World
from lg.errors import ConfigError
from tests.config.config_cases import nested

SECTIONS = [name for name in DEFAULTS if name not in DEFAULT_VALUES]
NAMES = re.compile("|".join(sorted([*DEFAULT_VALUES, *SECTIONS], key=len, reverse=True)))
NUMBERS = (0, 1, 2, 3, 4, 5, 8, 12, 16, 24, 0.1, 0.5, 0.99, 2.5)
ODD = (None, True, -1, 0, 0.5, 1e9, float("nan"), "", "x y", "two\nlines", [], [1, "x"], {"a": []})


def load(path: Path, opts: list[Any]) -> CfgNode | str:
    """Return the config, or the one line of its ConfigError."""
    try:
        return lg.load_config(path, opts)
    except ConfigError as error:
        text = str(error)
        assert 0 < len(text) < 600 and "\n" not in text
        return text


def check_round_trip(cfg: CfgNode, path: Path) -> None:
    path.write_text(dump_config(cfg), encoding="utf-8")
    first, second = (
        {key: (type(value), value) for key, value in flatten(tree)}
        for tree in (cfg, lg.load_config(path))
    )
    assert first == second


@pytest.mark.parametrize("key", DEFAULT_VALUES)
def test_any_value_is_rejected_by_name_or_loads(tmp_path: Path, key: str) -> None:
    path, rejected = tmp_path / "run.yaml", 0
    path.write_text("DISTILLATION: {ENABLE_INTER: false}")
    for value in ODD:
        outcome = load(path, [key, value])
        if isinstance(outcome, str):
            rejected += 1
            assert NAMES.match(outcome) or outcome.startswith("Unknown config key "), outcome
        else:
            check_round_trip(outcome, tmp_path / "copy.yaml")
    assert rejected >= len(ODD) // 2


@pytest.mark.parametrize("key", DEFAULT_VALUES)
def test_a_misspelt_key_is_reported_with_the_right_one(tmp_path: Path, key: str) -> None:
    path = tmp_path / "run.yaml"
    path.touch()
    last = key.rpartition(".")[2]
    at = len(key) - len(last) // 2
    swapped = f"{key[: at - 1]}{key[at : at + 1]}{key[at - 1]}{key[at + 1 :]}"
    for wrong in (key[:at] + key[at + 1 :], key[:at] + "Q" + key[at:], swapped, key.lower()):
        if wrong not in DEFAULT_VALUES:
            message = load(path, [wrong, 1])
            assert isinstance(message, str) and message.startswith("Unknown config key ")
            assert key in message.partition("Nearest known keys")[2], message


# --- Small models ------------------------------------------------------------------------------

PLAIN = {"PATCH_SIZE": 4, "HIDDEN_DIM": 24, "DEPTH": 3, "NUM_HEADS": 2, "MLP_RATIO": 2}
STAGED = {"HIDDEN_DIM": [8, 16], "DEPTH": [2, 1], "NUM_HEADS": [1, 2], "MLP_RATIO": [2, 2.5]}
OVERLAPPING = {**STAGED, "PATCH_SIZE": [5, 3], "PATCH_STRIDE": [4, 2]}
CVT = {key: value[:2] for key, value in DEFAULTS["CVT"].items()} | {"WITH_CLS_TOKEN": [False, True]}
# A small model of each family, for images of 16 pixels.
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "DeiT": {"TRANSFORMER": PLAIN},
    "T2TViT": {"TRANSFORMER": {**PLAIN, "PATCH_SIZE": None}, "T2T": {"TOKEN_DIM": 8}},
    "PiT": {"TRANSFORMER": {**STAGED, "PATCH_SIZE": 4, "MLP_RATIO": 2}, "PIT": {"STRIDE": 2}},
    "PVT": {"TRANSFORMER": {**STAGED, "PATCH_SIZE": [4, 2]}, "PVT": {"SR_RATIO": [2, 1]}},
    "PVTv2": {"TRANSFORMER": OVERLAPPING, "PVT": {"SR_RATIO": [2, 1]}},
    "ConViT": {"TRANSFORMER": PLAIN, "CONVIT": {"LOCAL_LAYERS": 2}},
    "CvT": {"TRANSFORMER": {**OVERLAPPING, "PATCH_PADDING": 1}, "CVT": CVT},
    "ResNet": {"CNN": {"DEPTH": 8}},
    "timm/test_resnet": {},
    "timm/test_vit3": {},
}


def draw_value(random: Random, key: str) -> Any:
    """Draw a value that a key accepts; numbers are small, so that models stay small."""
    single, elements = accepted_types(key)
    pool = [c for c in CHOICES.get(key, ("", "a")) if c != "timm/NAME"]
    values = [v for v in (True, False, *pool, *NUMBERS) if type(v) in (*single, *elements)]
    values = [v for v in values if key not in RANGES or RANGES[key][0](v)] or [DEFAULT_VALUES[key]]
    if elements and (not single or random.random() < 0.5):
        return random.choices(values, k=random.randint(1, 3))
    return random.choice(values)


def draw_small_model(random: Random) -> dict[str, Any]:
    """Draw a small model, often guided, with up to three keys changed to values they accept."""
    kind = random.choice(sorted(TINY))
    tree = {"MODEL": {"TYPE": kind, "IMG_SIZE": 16, "NUM_CLASSES": 10}, **TINY[kind]}
    tree |= {"TRAIN": {"DATASET": "digits", "BATCH_SIZE": 8}}
    if random.random() < 0.5:
        guide: dict[str, Any] = {"ENABLE_INTER": True, "TEACHER_IMG_SIZE": 16}
        for side in ("STUDENT", "TEACHER"):
            guide[f"INTER_{side}_INDEX"] = random.sample(range(3), 2)
        tree |= {"CNN": {"DEPTH": 8}, "DISTILLATION": guide}
    near = [key for key in DEFAULT_VALUES if key.partition(".")[0] in tree]
    keys = random.sample(near, random.randint(0, 2)) + random.sample(list(DEFAULT_VALUES), 1)
    changed = {key: draw_value(random, key) for key in keys if key != "MODEL.TYPE"}
    return dict(flatten(tree)) | changed


def build_and_step(cfg: CfgNode) -> None:
    """Build what training builds, except for its data, and take a step on random images."""
    torch.manual_seed(1)
    world = World()
    builders.check_training(cfg, trained_guide=False)
    builders.check_world(cfg, world)
    device = builders.build_device(cfg, world)
    precision = builders.build_precision(cfg, device)
    guided, guide, loss = builders.build_guided(cfg)
    builders.synchronize_batch_norms(cfg, [guided, guide], world, device)
    optimizer, rates = builders.build_optimizer(cfg, guided), builders.build_learning_rate(cfg)
    average = builders.build_average(cfg, guided.student)
    resources = builders.build_resources(cfg)
    assert resources["nodes"] * resources["tasks_per_node"] == cfg.NUM_GPUS
    for epoch in (cfg.OPTIM.MAX_EPOCH - 1, cfg.OPTIM.MAX_EPOCH // 2, 0):
        assert 0 <= rates.apply(optimizer, epoch) <= cfg.OPTIM.BASE_LR * (1 + 1e-9)
    count, side = 4, cfg.MODEL.IMG_SIZE
    labels = torch.arange(count) % cfg.MODEL.NUM_CLASSES
    pixels = torch.rand(count, 3, side, side)
    images, targets = builders.build_mixing(cfg)(pixels, labels, np.random.default_rng(1))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(count), atol=1e-5, rtol=0)
    with precision.autocast():
        logits, maps = guided.train()(images)
        imitated = guide(images, torch.arange(count), torch.zeros(count, 5))
    terms = loss(logits, maps, targets, *imitated)
    assert terms["loss"].shape == () and bool(terms["cls"].isfinite())
    precision.scaler.scale(terms["loss"]).backward()
    optimizer.step()
    if average is not None:
        average.follow(guided.student, 0, warming=False)


@pytest.mark.filterwarnings("ignore:DISTILLATION.TEACHER_WEIGHTS is null")
def test_a_valid_config_builds_and_takes_a_step(tmp_path: Path) -> None:
    path, random = tmp_path / "run.yaml", Random(1)
    outcomes = {"rejected by load_config": 0, "rejected by a builder": 0, "trained": 0}
    for _ in range(120):
        path.write_text(yaml.safe_dump(nested(draw_small_model(random))), encoding="utf-8")
        cfg = load(path, [])
        if isinstance(cfg, str):
            assert NAMES.match(cfg)
            outcomes["rejected by load_config"] += 1
            continue
        check_round_trip(cfg, tmp_path / "copy.yaml")
        try:
            build_and_step(cfg)
        except ConfigError as error:
            assert NAMES.search(str(error)), path.read_text()
            outcomes["rejected by a builder"] += 1
        else:
            outcomes["trained"] += 1
    assert outcomes["trained"] > 40 and min(outcomes.values()) > 5, outcomes
