"""Weights that timm publishes, loaded strictly from a local file."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import lg
from lg.builders import build_teacher
from lg.checkpoint import foreign_weights, read_checkpoint
from lg.errors import CheckpointError
from lg.models import Backbone, timm_model

NAMES = ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "levit_128s", "pvt_v2_b0"]


def published(name: str, num_classes: int = 1000) -> dict[str, torch.Tensor]:
    """Return weights as timm would publish them, unlike those of any fresh model."""
    torch.manual_seed(1)
    state = timm.create_model(name, num_classes=num_classes).state_dict()
    return {k: torch.randn_like(v) if v.is_floating_point() else v + 3 for k, v in state.items()}


def build(name: str, weights: dict[str, torch.Tensor], **changes: object) -> Backbone:
    sizes = {"img_size": 224, "in_channels": 3, "num_classes": 10, **changes}
    return timm_model(name, **sizes, pretrained=weights)


@pytest.mark.parametrize("name", NAMES)
def test_all_but_the_classifier_is_loaded(name: str) -> None:
    weights = published(name)
    before = {k: v.clone() for k, v in weights.items()}
    model = build(name, weights)
    found = model.net.get_classifier()
    own = [id(m) for m in (found if isinstance(found, tuple) else (found,))]
    heads = tuple(f"{n}." for n, m in model.net.named_modules() if id(m) in own)
    state = model.net.state_dict()
    assert set(state) == set(weights)
    for key, value in state.items():
        assert torch.equal(value, weights[key]) != key.startswith(heads), key
    assert list(weights) == list(before)
    assert all(torch.equal(weights[k], v) for k, v in before.items())  # unchanged


def test_a_classifier_of_the_same_size_is_loaded() -> None:
    for count in (1000, 21):
        weights = published("resnet18", count)
        model = build("resnet18", weights, num_classes=count)
        assert torch.equal(model.net.fc.weight, weights["fc.weight"])


def test_weights_without_a_classifier_are_accepted() -> None:
    weights = {k: v for k, v in published("resnet18").items() if not k.startswith("fc.")}
    model = build("resnet18", weights)
    assert model.net.fc.out_features == 10
    assert torch.equal(model.net.conv1.weight, weights["conv1.weight"])


def test_positions_are_resized_and_the_input_convolution_adapted() -> None:
    weights = published("vit_tiny_patch16_224")
    model = build("vit_tiny_patch16_224", weights, img_size=96, in_channels=1)
    assert model.net.pos_embed.shape == (1, 37, 192)
    assert torch.equal(model.net.pos_embed[:, 0], weights["pos_embed"][:, 0])
    kernel = weights["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.net.patch_embed.proj.weight.data, kernel)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("layer3.0.conv1.weight"), "layer3.0.conv1.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra"),
        (lambda w: w.update({"bn1.weight": torch.zeros(3)}), "bn1.weight"),
    ],
)
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_weights_of_another_model_are_rejected(change, named: str, num_classes: int) -> None:
    weights = published("resnet18")
    change(weights)
    with pytest.raises(ValueError, match=f"do not fit timm/resnet18: .*{named}"):
        build("resnet18", weights, num_classes=num_classes)


def config(tmp_path: Path, **settings: str) -> object:
    path = tmp_path / "run.yaml"
    path.write_text("MODEL: {TYPE: timm/resnet18, IMG_SIZE: 32, NUM_CLASSES: 10}\n")
    return lg.load_config(path, [x for pair in settings.items() for x in pair])


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_config_names_the_file(tmp_path: Path, ending: str) -> None:
    weights = published("resnet18")
    file = tmp_path / f"weights.{ending}"
    if ending == "pth":
        wrapped = {"model": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}
        torch.save(wrapped, file)
    else:
        safetensors.torch.save_file(weights, file)
    model = lg.build_model(config(tmp_path, **{"MODEL.PRETRAINED": str(file)}))
    assert torch.equal(model.net.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])


def test_a_guide_takes_the_file_as_its_weights(tmp_path: Path) -> None:
    weights = published("resnet18")
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(weights, file)
    settings = {
        "DISTILLATION.ENABLE_INTER": "True",
        "DISTILLATION.INTER_STUDENT_INDEX": "[0]",
        "DISTILLATION.INTER_TEACHER_INDEX": "[7]",
        "DISTILLATION.TEACHER_MODEL": "timm/resnet18",
        "DISTILLATION.TEACHER_WEIGHTS": str(file),
    }
    teacher = build_teacher(config(tmp_path, **settings))
    assert torch.equal(teacher.net.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])
    # Its logits cannot be imitated, because its classes differ.
    settings["DISTILLATION.ENABLE_LOGIT"] = "True"
    with pytest.raises(CheckpointError, match=r"fc.weight is \[1000, 512\], the model has \[10,"):
        build_teacher(config(tmp_path, **settings))


def test_files_without_weights_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="is damaged or incomplete"):
        read_checkpoint(file)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no weights: its keys are epoch, model\. Use"):
        foreign_weights({"epoch": 1, "model": 3}, "a.pth")


def test_an_average_is_preferred() -> None:
    mean, last = torch.zeros(1), torch.ones(1)
    state = {"state_dict": {"a": last}, "model_ema": {"module.a": mean}}
    assert foreign_weights(state, "a.pth") == {"a": mean}
