"""Checkpoints: choosing and loading weights, and the folder of a run."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import lg
from lg.checkpoint import (
    CheckpointFolder,
    choose_weights,
    load_weights,
    random_state,
    read_checkpoint,
    restore_random_state,
)
from lg.errors import CheckpointError
from lg.models import timm_model
from tests.checkpoint_cases import same_state, saved, small_state

ROOT = Path(__file__).parents[1]


# --- Which weights -----------------------------------------------------------------------------

MODEL, AVERAGE = {"w": torch.zeros(1)}, {"w": torch.ones(1)}


@pytest.mark.parametrize(
    ("errors", "average"),
    [
        ({"test_err": 10.0, "ema_err": 20.0}, False),
        ({"test_err": 20.0, "ema_err": 10.0}, True),
        ({"test_err": 10.0, "ema_err": 10.0}, False),
        ({"test_err": 100.0, "ema_err": 100.0}, False),
        ({}, False),
        ({"ema_err": 30.0}, True),
        ({"test_err": 30.0}, False),
        ({"test_err": None, "ema_err": 30.0}, True),
        ({"test_err": 30.0, "ema_err": None}, False),
        ({"test_err": float("nan"), "ema_err": 30.0}, True),
        ({"test_err": 30.0, "ema_err": float("nan")}, False),
        ({"test_err": np.float64(30), "ema_err": np.float32(20)}, True),
        ({"test_err": torch.tensor(30.0), "ema_err": torch.tensor([20.0])}, True),
        ({"test_err": "low", "ema_err": torch.zeros(2)}, False),
    ],
)
def test_weights_with_the_lower_error_are_chosen(errors: dict[str, Any], average: bool) -> None:
    state = {"model_state": MODEL, "ema_state": AVERAGE, **errors}
    assert float(choose_weights(state, "a")["w"]) == float(average)
    for nothing in ({}, None):
        assert float(choose_weights({**state, "ema_state": nothing}, "a")["w"]) == 0
    assert float(choose_weights({"model_state": MODEL, **errors}, "a")["w"]) == 0


def test_bare_state_dict_is_accepted() -> None:
    assert choose_weights(MODEL, "a") == MODEL
    with pytest.raises(CheckpointError, match=r"a\.pyth has no model_state; its keys are state_d"):
        choose_weights({"state_dict": MODEL, "x": 1}, "a.pyth")


@pytest.mark.parametrize("key", ["model_state", "ema_state"])
@pytest.mark.parametrize("value", [torch.ones(3), [1], "text"])
def test_parts_that_are_not_dicts_are_rejected(key: str, value: Any) -> None:
    state = {"model_state": MODEL, "ema_state": AVERAGE, "ema_err": 1.0, key: value}
    with pytest.raises(CheckpointError, match=rf"a holds a {type(value).__name__} as its {key}"):
        choose_weights(state, "a")


# --- Files of safetensors ----------------------------------------------------------------------


def test_safetensors_are_read_only_if_intact(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = {"n": torch.tensor(7), "w": torch.arange(600.0).reshape(3, 200)}
    safetensors.torch.save_file(state, path)
    assert same_state(read_checkpoint(path), state)
    whole = path.read_bytes()
    pickled = saved(tmp_path / "b.pyth", state).read_bytes()
    for content in (b"", whole[:5], whole[:40], whole[:900], whole[:-1], whole + b"x", pickled):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged or incomplete"):
            read_checkpoint(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read"):
        read_checkpoint(path)


# --- Published weights of timm models ----------------------------------------------------------

SIZES = {"img_size": 32, "in_channels": 3, "num_classes": 10}


def weights_of(name: str, **settings: object) -> dict[str, torch.Tensor]:
    """Return weights that differ from those of any new model."""
    torch.manual_seed(1)
    state = timm.create_model(name, **settings).state_dict()
    return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}


def test_weights_that_timm_loads_loosely_must_be_complete() -> None:
    weights = weights_of("dla46_c")
    loaded = timm_model(
        "dla46_c", **SIZES, pretrained={**weights, "level3.project.0.weight": torch.ones(1)}
    )
    for key, value in loaded.net.state_dict().items():
        assert torch.equal(value, weights[key]) != key.startswith("fc."), key
    del weights["level3.tree2.root.conv.weight"]
    with pytest.raises(ValueError, match=r"not fit timm/dla46_c: .* level3\.tree2\.root\.conv\.w"):
        timm_model("dla46_c", **SIZES, pretrained=weights)


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_weights_with_the_same_channels_are_loaded_unchanged(channels: int) -> None:
    weights = weights_of("resnet18", in_chans=channels)
    sizes = {**SIZES, "in_channels": channels}
    model = timm_model("resnet18", **sizes, pretrained=weights)
    assert torch.equal(model.net.conv1.weight, weights["conv1.weight"])
    del weights["layer3.0.conv1.weight"]
    with pytest.raises(ValueError, match=r"not fit timm/resnet18: .*layer3\.0\.conv1\.weight"):
        timm_model("resnet18", **sizes, pretrained=weights)
    other = weights_of("resnet18", in_chans=4)
    with pytest.raises(ValueError, match=r"not fit timm/resnet18: .*conv1"):
        timm_model("resnet18", **{**sizes, "in_channels": 7}, pretrained=other)


def test_weights_without_the_head_norm_keep_its_initial_values() -> None:
    name = "convnextv2_atto.fcmae"
    whole = weights_of(name, num_classes=0)
    weights = {k: v for k, v in whole.items() if not k.startswith("head.")}
    model = timm_model(name, **SIZES, pretrained=weights)
    assert all(torch.equal(model.net.state_dict()[k], v) for k, v in weights.items())
    assert torch.all(model.net.head.norm.weight == 1) and model.net.head.fc.out_features == 10


def test_model_does_not_keep_the_weights_and_torch_is_not_patched() -> None:
    load = torch.nn.Module.load_state_dict
    model = timm_model("resnet18", **SIZES, pretrained=weights_of("resnet18"))
    assert "state_dict" not in model.net.pretrained_cfg
    with pytest.raises(ValueError, match="not fit"):
        timm_model("resnet18", **SIZES, pretrained={"a": torch.zeros(1)})
    assert torch.nn.Module.load_state_dict is load


# --- Loading into a model ----------------------------------------------------------------------


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return lg.build_model(lg.load_config(ROOT / "configs" / "digits" / "r-8_digits.yaml"))


def test_load_weights_loads_the_better_weights_and_returns_the_facts(
    tmp_path: Path, model: torch.nn.Module
) -> None:
    first = {k: v.clone() for k, v in lg.published_state_dict(model).items()}
    second = {k: v + 1 for k, v in first.items()}
    state = {"epoch": 4, "test_err": np.float64(9), "ema_err": 8.0, "cfg": "A: 1", "other": 5}
    path = saved(tmp_path / "a.pyth", {**state, "model_state": first, "ema_state": second})
    found = load_weights(model, path)
    assert found == {"epoch": 4, "test_err": 9.0, "ema_err": 8.0, "cfg": "A: 1"}
    assert type(found["test_err"]) is float
    assert same_state(lg.published_state_dict(model), second)
    assert load_weights(model, saved(tmp_path / "bare.pyth", first)) == {}
    assert same_state(lg.published_state_dict(model), first)


def test_rejected_weights_change_nothing(tmp_path: Path, model: torch.nn.Module) -> None:
    before = {k: v.clone() for k, v in lg.published_state_dict(model).items()}
    other = {k: v + 1 for k, v in before.items()}
    key = next(reversed(other))
    broken = [
        (key, {k: v for k, v in other.items() if k != key}),
        ("teacher.w", {**other, "teacher.w": torch.ones(1)}),
        (key, {**other, key: torch.ones(3, 3)}),
        (key, {**other, key: "text"}),
    ]
    for name, state in broken:
        path = saved(tmp_path / "a.pyth", {"model_state": state})
        with pytest.raises(CheckpointError) as caught:
            load_weights(model, path)
        assert str(path) in str(caught.value) and name in str(caught.value)
        assert same_state(lg.published_state_dict(model), before)


# --- The folder of a run -----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_last_checkpoints_and_the_best_are_kept(tmp_path: Path, keep: int) -> None:
    folder = CheckpointFolder(tmp_path, keep=keep)
    assert folder.files() == [] and folder.load_last(pytest.fail) is None
    for epoch in range(1, 5):
        path = folder.save(small_state(epoch), epoch=epoch, is_best=epoch == 2)
        assert path == tmp_path / "checkpoints" / f"model_epoch_{epoch:04d}.pyth"
    kept = [f"model_epoch_{e:04d}.pyth" for e in range(1, 5)][-keep:]
    assert [p.name for p in folder.files()] == kept
    assert sorted(os.listdir(tmp_path / "checkpoints")) == kept
    assert same_state(read_checkpoint(tmp_path / "model.pyth"), small_state(2))
    last = folder.load_last(pytest.fail)
    assert last is not None and same_state(last, small_state(4))


def test_files_are_sorted_by_epoch_and_other_files_ignored(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for epoch in (9999, 10000, 998):
        folder.save(small_state(), epoch=epoch, is_best=False)
    (folder.folder / "model_epoch_best.pyth").touch()
    (folder.folder / "notes.txt").touch()
    assert [int(p.stem[12:]) for p in folder.files()] == [998, 9999, 10000]
    assert not folder.best.exists()


def test_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for epoch in (1, 2, 3):
        folder.save(small_state(epoch), epoch=epoch, is_best=False)
    for path in folder.files()[1:]:
        path.write_bytes(path.read_bytes()[:900])
    warnings: list[str] = []
    state = folder.load_last(warnings.append)
    assert state is not None and same_state(state, small_state(1))
    assert len(warnings) == 2
    assert "model_epoch_0003.pyth" in warnings[0] and "model_epoch_0002.pyth" in warnings[1]
    assert "Skipping this checkpoint." in warnings[0]
    folder.files()[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .*0003.*0002.*0001.*OUT_DIR"):
        folder.load_last(warnings.append)


def test_best_is_written_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        "lg.checkpoint.write_atomically", lambda path, write: written.append(Path(path).name)
    )
    CheckpointFolder(tmp_path).save(small_state(), epoch=7, is_best=True)
    assert written == ["model.pyth", "model_epoch_0007.pyth"]


def test_random_states_are_restored(tmp_path: Path) -> None:
    kept = random.getstate()
    torch.manual_seed(11)
    path = saved(tmp_path / "a.pyth", {"rng_state": [random_state()]})
    wanted = torch.rand(3)
    torch.manual_seed(12)
    restore_random_state(read_checkpoint(path)["rng_state"][0])
    assert torch.equal(torch.rand(3), wanted)
    assert random.getstate() == kept  # Python's own generator is not touched
