"""Errors about models: the builder names config keys where the models name their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lg
from lg.builders import build_teacher
from lg.builders.guides import check_guide_classes
from lg.config import dump_config
from lg.errors import CheckpointError, ConfigError

PLAIN = "PATCH_SIZE: 16, HIDDEN_DIM: 33, DEPTH: 2, NUM_HEADS: 2, MLP_RATIO: 2"
STAGED = "HIDDEN_DIM: [8, 16], DEPTH: [1, 1], NUM_HEADS: 1, MLP_RATIO: 2"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "DeiT",
            f"TRANSFORMER: {{{PLAIN}}}",
            "TRANSFORMER.HIDDEN_DIM 33 is not divisible by TRANSFORMER.NUM_HEADS 2: ",
        ),
        (
            "T2TViT",
            f"TRANSFORMER: {{{PLAIN.replace('33', '32')}}}\nT2T: {{STRIDE: [4, 2, 1]}}",
            r"TRANSFORMER.PATCH_SIZE is 16, but T2T.STRIDE \[4, 2, 1\] steps 8 pixels .*, "
            "or set TRANSFORMER.PATCH_SIZE to null",
        ),
        (
            "PVT",
            f"TRANSFORMER: {{PATCH_SIZE: [4, 2], {STAGED}}}\nPVT: {{SR_RATIO: [16, 1]}}",
            r"MODEL.IMG_SIZE 32 is too small for PVT.SR_RATIO \[16, 1\]: .* use .* 64 or more",
        ),
        (
            "timm/densenet121",
            "TRANSFORMER: {DROP_PATH_RATE: 0.1}",
            "MODEL.TYPE timm/densenet121: TRANSFORMER.DROP_PATH_RATE is 0.1, .* set it to 0",
        ),
        (
            "timm/test_resnet",
            "MODEL: {INIT: mimetic}",
            "MODEL.INIT is 'mimetic', but block .* of this timm model has no plain multi-head att",
        ),
        (
            "DeiT",
            "MODEL: {INIT: mimetic}\n"
            "TRANSFORMER: {PATCH_SIZE: 8, HIDDEN_DIM: 30, DEPTH: 1, NUM_HEADS: 2, MLP_RATIO: 2}",
            "MODEL.INIT is 'mimetic', but hidden_dim 30 is not a multiple of 4",
        ),
        ("timm/resnet_18", "{}", "MODEL.TYPE timm/resnet_18: timm .* no model 'resnet_18'; did"),
        (
            "timm/resnet18",
            "MODEL: {BLOCKS: [body]}",
            "MODEL.TYPE timm/resnet18: MODEL.BLOCKS has body, but the model has no such module",
        ),
    ],
)
def test_errors_name_the_keys_of_the_config(
    tmp_path: Path, kind: str, settings: str, message: str
) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(f"MODEL: {{TYPE: {kind}, IMG_SIZE: 32, NUM_CLASSES: 10}}\n")
    run = tmp_path / "run.yaml"
    run.write_text(f"_BASE_: [base.yaml]\n{settings if settings != '{}' else ''}\n")
    with pytest.raises(ConfigError, match=f"^{message}"):
        lg.build_model(lg.load_config(run))


def test_an_image_size_that_the_guide_rejects_is_named_by_the_key_of_the_guide(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "DISTILLATION: {ENABLE_INTER: True, INTER_STUDENT_INDEX: [0], INTER_TEACHER_INDEX: [0], "
        "TEACHER_MODEL: timm/vit_tiny_patch16_224, TEACHER_IMG_SIZE: 8}\n"
    )
    message = (
        "^DISTILLATION.TEACHER_MODEL 'timm/vit_tiny_patch16_224' cannot be built: "
        "DISTILLATION.TEACHER_IMG_SIZE 8 does not fit "
    )
    with pytest.raises(ConfigError, match=message):
        build_teacher(lg.load_config(run))


def test_a_wrong_guide_is_named_with_its_own_config(tmp_path: Path) -> None:
    guide = ["MODEL.TYPE", "ResNet", "MODEL.NUM_CLASSES", "10", "CNN.DEPTH", "8"]
    own = load(tmp_path, *guide[:2], "MODEL.NUM_CLASSES", "5", "CNN.DEPTH", "14")
    weights = lg.published_state_dict(lg.build_model(own))
    state = {"model_state": weights, "cfg": dump_config(own)}
    torch.save(state, tmp_path / "guide.pyth")
    guided = ["DISTILLATION.ENABLE_LOGIT", "True", *guide[2:], "MODEL.TYPE", "timm/test_vit"]
    guided += ["DISTILLATION.TEACHER_WEIGHTS", f"{tmp_path}/guide.pyth"]
    with pytest.raises(CheckpointError) as caught:
        build_teacher(load(tmp_path, *guided))
    text = str(caught.value)
    assert text.startswith(f"DISTILLATION.TEACHER_WEIGHTS: {tmp_path}/guide.pyth: the weights do n")
    assert text.endswith(
        ". The file was trained with MODEL.NUM_CLASSES 5, CNN.DEPTH 14 (TRAIN.DATASET digits); "
        "this config expects MODEL.NUM_CLASSES 10, CNN.DEPTH 8: make them equal, or name the "
        "weights of another guide"
    )
    student = load(tmp_path, "MODEL.TYPE", "timm/test_vit", "MODEL.NUM_CLASSES", "10")
    torch.save({**state, "cfg": dump_config(student)}, tmp_path / "guide.pyth")
    with pytest.raises(CheckpointError, match=r"with MODEL\.TYPE timm/test_vit \(.* expects D"):
        build_teacher(load(tmp_path, *guided))
    torch.save({**state, "cfg": ": not YAML ["}, tmp_path / "guide.pyth")
    with pytest.raises(CheckpointError, match=r"depth, width\)$"):
        build_teacher(load(tmp_path, *guided))


def test_scores_of_other_classes_are_not_imitated(tmp_path: Path) -> None:
    path = tmp_path / "guide.pyth"
    opts = ["DISTILLATION.ENABLE_LOGIT", "True", "MODEL.TYPE", "timm/test_vit", "CNN.DEPTH", "8"]
    cfg = load(tmp_path, *opts, "DISTILLATION.TEACHER_WEIGHTS", str(path))
    state = {"model_state": lg.published_state_dict(build_teacher(cfg, trained=False))}
    torch.save({**state, "class_names": ["cat", "dog"]}, path)
    check_guide_classes(cfg, ["cat", "dog"])
    with pytest.raises(CheckpointError, match=r"on the classes cat, dog, but .* have dog, cat; DI"):
        check_guide_classes(cfg, ["dog", "cat"])
    torch.save(state, path)  # a published guide
    check_guide_classes(cfg, ["dog", "cat"])


def load(folder: Path, *opts: str) -> Any:
    (folder / "run.yaml").write_text("TRAIN: {DATASET: digits}\nMODEL: {IMG_SIZE: 32}\n")
    return lg.load_config(folder / "run.yaml", opts)
