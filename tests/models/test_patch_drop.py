"""Dropped patches: which tokens are left, what guidance compares, which models can do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lg
from lg import trainer
from lg.errors import ConfigError
from lg.models import Backbone, deit, timm_model
from lg.models.patch_drop import drop_patches
from tests.models.test_families import PLAIN, build
from tests.run_cases import assert_same, config, final_state, stats, train_and_stop

MODELS = {
    "DeiT": lambda: deit(img_size=32, num_classes=10, patch_size=8, distilled=True, **PLAIN),
    "T2TViT": lambda: build("t2t"),
    "timm": lambda: timm_model("test_vit", img_size=160, in_channels=3, num_classes=10),
}


def dropping(family: str, rate: float) -> tuple[Backbone, torch.Tensor]:
    torch.manual_seed(0)
    model = MODELS[family]()
    drop_patches(model, rate)
    side = 160 if family == "timm" else 32
    return model, torch.randn(3, 3, side, side)


@pytest.mark.parametrize("family", MODELS)
def test_training_sees_the_kept_tokens_and_evaluation_all(family: str) -> None:
    model, images = dropping(family, 0.5)
    seen: dict[str, torch.Tensor] = {}
    patch_drop: Any = model.net.patch_drop
    patch_drop.register_forward_hook(lambda _, inputs, output: seen.update(i=inputs[0], o=output))
    for trained in (False, True, True):
        model.train(trained)
        _, maps = lg.feature_maps(model, images, [1])
        prefix, count = model.layouts[0].prefix, seen["i"].shape[1] - model.layouts[0].prefix
        if not trained:
            assert model.kept is None and torch.equal(seen["i"], seen["o"])
            assert maps[0].shape[2:] == model.layouts[0].size
            continue
        kept: Any = model.kept
        assert kept.shape == (3, count // 2) and maps[0].shape[2:] == (1, count // 2)
        assert (kept.diff(dim=1) > 0).all() and kept.max() < count
        assert not torch.equal(kept[0], kept[1])  # each image keeps others
        for image in range(3):
            before, after = seen["i"][image], seen["o"][image]
            assert torch.equal(after[:prefix], before[:prefix])
            assert torch.equal(after[prefix:], before[prefix + kept[image]])


def test_evaluation_and_state_are_those_of_the_plain_model() -> None:
    plain = MODELS["DeiT"]()
    state = plain.state_dict()
    model, images = dropping("DeiT", 0.5)
    model.load_state_dict(state)  # the same keys
    plain.eval(), model.eval()
    assert torch.equal(plain(images), model(images))


@pytest.mark.filterwarnings("ignore:DISTILLATION.TEACHER_WEIGHTS is null")
@pytest.mark.parametrize(
    ("transform", "blocks"),
    [("linear", "[0, 5]"), ("linear", "mix"), ("gram", "[0, 5]"), ("attention", "[0, 5]")],
)
def test_guidance_compares_the_positions_that_are_left(transform: str, blocks: str) -> None:
    opts = ["DISTILLATION.INTER_STUDENT_INDEX", blocks]
    opts += ["DISTILLATION.INTER_TEACHER_INDEX", "[0, 2]"]
    opts += ["TRAIN.PATCH_DROP", "0.5", "DISTILLATION.INTER_TRANSFORM", transform]
    opts += ["DISTILLATION.TEACHER_WEIGHTS", "null", "TRANSFORMER.DROP_PATH_RATE", "0.0"]
    cfg = lg.load_config("configs/digits/vit_digits_ours.yaml", opts)
    torch.manual_seed(0)
    guided, guide, loss = lg.build_guided(cfg)
    images = torch.randn(3, 3, 16, 16)
    logits, maps = guided.train()(images)
    kept: Any = guided.student.kept
    assert kept.shape == (3, 8)
    teacher_maps, _ = guide(images)
    terms = loss(logits, maps, torch.eye(10)[:3], teacher_maps)

    expected = 0.0
    for kept_map, teacher_map in zip(maps, teacher_maps, strict=True):
        grid = F.interpolate(teacher_map, size=(4, 4), mode="bilinear")
        pairs: list[list[torch.Tensor]] = [[], []]
        for image in range(3):
            for group, values in zip(
                pairs,
                (
                    kept_map.features[image, :, 0].T,
                    torch.stack([grid[image, :, p // 4, p % 4] for p in kept[image].tolist()]),
                ),
                strict=True,
            ):
                if transform == "gram":
                    values = values.T @ values / 8
                if transform == "attention":
                    values = values.square().mean(dim=1)
                    values = values / values.norm()
                group.append(values)
        expected += (torch.stack(pairs[0]) - torch.stack(pairs[1])).square().mean().item()
    assert terms["inter"].item() == pytest.approx(expected, rel=1e-5)
    terms["loss"].backward()
    assert all(p.grad is not None for p in guided.heads.parameters())


def test_dropping_trains_and_resumes_exactly(tmp_path: Path, guide_file: Path) -> None:
    changes = {"TRAIN__PATCH_DROP": 0.5, "OPTIM__MAX_EPOCH": 2}
    straight, resumed, plain = (
        config(tmp_path / name, guide_file, **{**changes, **others})
        for name, others in [("a", {}), ("b", {}), ("c", {"TRAIN__PATCH_DROP": 0.0})]
    )
    trainer.train(straight)
    train_and_stop(resumed, 2)
    torch.manual_seed(99)
    trainer.train(resumed)
    left, right = (final_state(tmp_path / name, epoch=2) for name in "ab")
    assert_same(right, left)
    text = (tmp_path / "a" / "log.txt").read_text()
    assert "TRAIN.PATCH_DROP: training keeps 8 of 16 patches of each image." in text
    trainer.train(plain)
    losses = [
        [line["loss"] for line in stats(tmp_path / name) if line["_type"] == "train_epoch"]
        for name in "ac"
    ]
    assert losses[0] != losses[1]
    with pytest.raises(ConfigError, match=r"TRAIN\.PATCH_DROP: 0\.5 -> 0\.25"):
        trainer.train(config(tmp_path / "a", guide_file, TRAIN__PATCH_DROP=0.25))


def test_a_timm_model_that_needs_all_patches_is_named(tmp_path: Path) -> None:
    text = "MODEL: {TYPE: timm/test_convnext, IMG_SIZE: 64}\nTRAIN: {PATCH_DROP: 0.5}"
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"PATCH_DROP is 0\.5, but this timm model needs"):
        lg.build_model(lg.load_config(tmp_path / "run.yaml"))
