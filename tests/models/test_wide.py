"""WideLast and Lift: sizes, what the last block computes, checkpoints, prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

import lg
from lg import trainer
from lg.models import Backbone, deit, load_published_state_dict, published_state_dict
from lg.tools.info import describe_config
from tests.models.test_families import build
from tests.run_cases import config

C, W, K, RATIO, HEADS = 32, 64, 10, 3, 2


def vit(**changes: Any) -> Backbone:
    settings = {"hidden_dim": C, "depth": 3, "num_heads": HEADS, "mlp_ratio": RATIO}
    torch.manual_seed(0)
    model = deit(img_size=32, num_classes=K, patch_size=8, **settings, **changes)
    for head in ("head", "head_dist"):
        if hasattr(model.net, head):
            nn.init.normal_(getattr(model.net, head).weight)
    return model.eval()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def block_size(width: int) -> int:
    """Parameters of a block: four matrices of attention, two of the MLP, biases, two norms."""
    return (4 + 2 * RATIO) * width**2 + (4 + RATIO + 1) * width + 4 * width


def test_parameters_are_counted_by_hand() -> None:
    tail = 2 * (W - C) + K * (W - C)  # norm and classifier
    wide, lifted = vit(wide_last=W), vit(lift=W)
    assert count(wide) - count(vit()) == block_size(W) - block_size(C) + C * W + 2 * W + tail
    assert count(lifted) - count(vit()) == C * W + tail
    assert wide.feature_dims == lifted.feature_dims == [C, C, W]
    attention: Any = wide.blocks[-1].attn
    assert attention.num_heads == HEADS * W // C  # heads stay as wide as they were


def test_the_last_block_and_the_classifier_compute_what_they_should() -> None:
    images = torch.randn(2, 3, 32, 32)
    plain = Block(W, HEADS * W // C, mlp_ratio=RATIO, qkv_bias=True).eval()
    narrow = Block(C, HEADS, mlp_ratio=RATIO, qkv_bias=True).eval()
    for block in (plain, narrow):
        block.norm1.eps = block.norm2.eps = 1e-6
    for changes, reference in (({"wide_last": W}, plain), ({"lift": W}, narrow)):
        model = vit(**changes)
        last: Any = model.blocks[-1]
        kept = {k: v for k, v in last.state_dict().items() if not k.startswith("lift")}
        reference.load_state_dict(kept)
        logits, (before, after) = lg.feature_maps(model, images, [1, 2])
        tokens: list[torch.Tensor] = []
        last.register_forward_hook(lambda _, inputs, output, t=tokens: t.extend((*inputs, output)))
        model(images)
        expected = reference(last.lift(tokens[0])) if "wide_last" in changes else None
        if expected is None:
            expected = reference(tokens[0]) @ last.lift.weight.T
        torch.testing.assert_close(tokens[1], expected)
        assert before.shape == (2, C, 4, 4) and after.shape == (2, W, 4, 4)
        assert torch.equal(after.flatten(2).mT, tokens[1][:, 1:])
        net: Any = model.net
        norm = torch.nn.functional.layer_norm(tokens[1][:, 0], (W,), eps=1e-6)
        torch.testing.assert_close(logits, norm @ net.head.weight.T + net.head.bias)


@pytest.mark.parametrize("key", ["wide_last", "lift"])
def test_t2t_and_distilled_models_have_them_and_their_weights_load(key: str) -> None:
    distilled = vit(distilled=True, **{key: W})
    assert [m.in_features for m in (distilled.net.head, distilled.net.head_dist)] == [W, W]
    assert len(distilled.head_names()) == 4
    for build_it in (lambda: build("t2t", **{key: W}), lambda: vit(distilled=True, **{key: W})):
        left, right = build_it().eval(), build_it().eval()
        load_published_state_dict(right, published_state_dict(left))
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(left(images), right(images))
        assert left.feature_dims == [C, C, W]


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="wide_last 72 is not a multiple of 16"):
        vit(wide_last=72)


@pytest.mark.parametrize("key", ["WIDE_LAST", "LIFT"])
def test_training_testing_and_prediction_agree(tmp_path: Path, guide_file: Path, key: str) -> None:
    changes: dict[str, Any] = {f"TRANSFORMER__{key}": 48, "OPTIM__MAX_EPOCH": 1}
    cfg = config(tmp_path, guide_file, **changes, OPTIM__EMA_UPDATE_PERIOD=0)
    parameters = count(lg.build_model(cfg))
    assert f"10 classes: {parameters:,} parameters" in describe_config(cfg)[0]
    trainer.train(cfg)
    result = trainer.test(cfg)
    predictor = lg.load_predictor(tmp_path / "model.pyth")
    model: Any = predictor.model
    assert model.feature_dims == [24, 48]
    found = lg.evaluate(cfg)
    wrong = found.probabilities.argmax(axis=1) != found.labels
    assert 100 * wrong.mean() == pytest.approx(result.top1_err)
