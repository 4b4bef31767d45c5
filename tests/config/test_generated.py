"""Two thousand generated configs: a broken one gives one clear error with its key, a valid one
loads, reads back as it was, builds and takes a training step. They are the same in every run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yacs.config import CfgNode

import lg
from lg import builders
from lg.config import dump_config, flatten
from lg.distributed import World
from lg.errors import ConfigError
from tests.config import config_draws
from tests.config.config_draws import CHOICE, KEYS, RANGE, SECTIONS, TYPE, Given

BAD, MISSPELT, ABSURD, TEXT, SMALL = 600, 150, 450, 300, 500  # examples of each test: 2,000


def tally(
    count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any, Path], str], folder: Path
) -> Counter[str]:
    """How often `check` said what of as many examples."""
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(case: Any) -> None:
        outcomes[check(case, folder)] += 1

    one()
    assert sum(outcomes.values()) == count
    return outcomes


def refusal(error: ConfigError, limit: int = 700) -> str:
    """The text of an error, which is one short line."""
    text = str(error)
    assert 0 < len(text) < limit and "\n" not in text and "Traceback" not in text, text
    return text


def load(case: Given, folder: Path) -> CfgNode | str:
    """The config, or the line that refuses it; any other error fails the test."""
    try:
        return lg.load_config(case.write(folder), case.opts)
    except ConfigError as error:
        assert error.__cause__ is None  # nor is a traceback of another shown with it
        assert error.__context__ is None or error.__suppress_context__
        return refusal(error)


_NAMES = re.compile("|".join(sorted([*KEYS, *SECTIONS], key=len, reverse=True)))


def check_round_trip(cfg: CfgNode, folder: Path) -> None:
    copy = folder / "copy.yaml"
    copy.write_text(dump_config(cfg), encoding="utf-8")
    first, second = (
        {key: (type(value), value) for key, value in flatten(tree)}
        for tree in (cfg, lg.load_config(copy))
    )
    assert first == second


# --- Broken ones -------------------------------------------------------------------------------


def check_bad_value(drawn: tuple[Given, str, str], folder: Path) -> str:
    case, key, kind = drawn
    text = load(case, folder)
    assert isinstance(text, str), f"{key} was let through"
    assert text.startswith(f"{key} is ") and kind in text
    assert ("run.yaml" if key in case.in_file else "the command line") in text
    return kind


def test_a_bad_value_is_refused_by_name(tmp_path: Path) -> None:
    kinds = tally(BAD, config_draws.with_one_bad_value(), check_bad_value, tmp_path)
    assert min(kinds[TYPE], kinds[RANGE], kinds[CHOICE]) > BAD / 5


def check_misspelt(drawn: tuple[str, str, Path | None, bool], folder: Path) -> str:
    key, wrong, base, typed = drawn
    text = load(Given(base, {}, [wrong, 1]) if typed else Given(base, {wrong: 1}, []), folder)
    assert isinstance(text, str) and text.startswith("Unknown config key ")
    lower = not typed and wrong.islower() and "." in key  # then the section stands in the way
    assert (key.partition(".")[0] if lower else key) in text
    return "typed" if typed else "written"


def test_a_misspelt_key_is_named_with_the_right_one(tmp_path: Path) -> None:
    places = tally(MISSPELT, config_draws.misspelt(), check_misspelt, tmp_path)
    assert min(places["typed"], places["written"]) > MISSPELT / 5


def check_absurd(case: Given, folder: Path) -> str:
    cfg = load(case, folder)
    if isinstance(cfg, str):
        assert _NAMES.search(cfg) or cfg.startswith("Unknown config key ")
        return "refused"
    check_round_trip(cfg, folder)
    return "taken"


def test_any_value_is_refused_or_taken(tmp_path: Path) -> None:
    outcomes = tally(ABSURD, config_draws.absurd(), check_absurd, tmp_path)
    assert min(outcomes["refused"], outcomes["taken"]) > ABSURD / 5


def check_text(text: str, folder: Path) -> str:
    path = folder / "text.yaml"
    path.write_bytes(text.encode())
    try:
        cfg = lg.load_config(path)
    except ConfigError as error:
        said = refusal(error)
        assert "text.yaml" in said or _NAMES.search(said)
        return "refused"
    check_round_trip(cfg, folder)
    return "read"


def test_broken_text_is_refused_or_read(tmp_path: Path) -> None:
    outcomes = tally(TEXT, config_draws.broken_text(), check_text, tmp_path)
    assert min(outcomes["refused"], outcomes["read"]) > TEXT / 5


# --- Valid ones --------------------------------------------------------------------------------


def build_and_step(cfg: CfgNode) -> None:
    """What training builds but for its data, and one step on made-up images."""
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
    assert builders.build_settings(cfg).num_classes == cfg.MODEL.NUM_CLASSES
    assert builders.build_resources(cfg).num_processes == cfg.NUM_GPUS
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
        average.update(0, warming=False)


def check_small(case: Given, folder: Path) -> str:
    cfg = load(case, folder)
    if isinstance(cfg, str):
        assert _NAMES.search(cfg)
        return "refused when loaded"
    check_round_trip(cfg, folder)
    try:
        build_and_step(cfg)
    except ConfigError as error:
        assert _NAMES.search(refusal(error, limit=2000))  # some list the modules of a model
        return "refused when built"
    return "trained"


@pytest.mark.filterwarnings("ignore:DISTILLATION.TEACHER_WEIGHTS is null")
def test_a_valid_config_builds_and_steps(tmp_path: Path) -> None:
    outcomes = tally(SMALL, config_draws.small_models(), check_small, tmp_path)
    assert outcomes["trained"] > SMALL / 3
    assert min(outcomes["refused when loaded"], outcomes["refused when built"]) > SMALL / 50
