"""Mimetic initialisation: the products of weights, and positions, of each family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lg.models import Backbone, deit, timm_model
from lg.models.mimetic import init_mimetic
from tests.models.test_families import PLAIN, build


def vit(**sizes: Any) -> Backbone:
    return deit(img_size=32, num_classes=10, patch_size=8, **{**PLAIN, **sizes})


MODELS = {
    "DeiT": lambda: vit(distilled=True),
    "T2TViT": lambda: build("t2t"),
    "PiT": lambda: build("pit"),
    "timm": lambda: timm_model("test_vit", img_size=32, in_channels=3, num_classes=10),
}


@pytest.mark.parametrize("family", MODELS)
def test_products_of_weights_are_near_multiples_of_the_identity(family: str) -> None:
    torch.manual_seed(0)
    model = MODELS[family]()
    norms = {k: v.clone() for k, v in model.state_dict().items() if ".attn." not in k}
    init_mimetic(model)
    for block in model.blocks:
        attention: Any = block.attn
        width, heads = attention.proj.in_features, attention.num_heads
        query, key, value = attention.qkv.weight.detach().split(width)
        product = value.T @ attention.proj.weight.detach().T
        diagonal, off = product.diagonal(), product[~torch.eye(width, dtype=torch.bool)]
        deviation = 0.4 / math.sqrt(width)  # of the noise
        assert diagonal.mean().item() == pytest.approx(-0.4, abs=4 * deviation / math.sqrt(width))
        assert off.std().item() == pytest.approx(deviation, rel=0.15)
        # Within a head, the product keeps the largest singular values of 0.7 I + 0.7 Z, and both
        # factors have the same share of them.
        for q, k in zip(query.chunk(heads), key.chunk(heads), strict=True):
            torch.testing.assert_close(torch.linalg.svdvals(q), torch.linalg.svdvals(k))
            values = torch.linalg.svdvals(q.T @ k)[: width // heads]
            assert 0.7 * 2 < values[0] < 0.7 * 3.2 and (q.T @ k).trace() > 0
    for name, before in norms.items():
        if not name.endswith("pos_embed"):
            assert torch.equal(before, model.state_dict()[name]), name


def test_positions_are_sinusoids_of_row_and_column() -> None:
    model = vit(distilled=True)
    before = model.net.pos_embed.detach().clone()
    init_mimetic(model)
    after: Any = model.net.pos_embed.detach()
    assert torch.equal(after[:, :2], before[:, :2])  # class and distillation token
    patches = after[0, 2:].unflatten(0, (4, 4))
    # A quarter each: sine of row, sine of column, cosine of row, cosine of column.
    step = torch.arange(4.0)
    torch.testing.assert_close(patches[:, :, 0], step.sin()[:, None].expand(4, 4))
    torch.testing.assert_close(patches[:, :, 8], step.sin()[None].expand(4, 4))
    torch.testing.assert_close(patches[:, :, 16], step.cos()[:, None].expand(4, 4))
    slow = step / 10000 ** (3 / 8)
    torch.testing.assert_close(patches[:, :, 27], slow.cos()[None].expand(4, 4))
    pit = build("pit")
    init_mimetic(pit)
    rows: Any = pit.net.pos_embed.detach()[0, 0]
    torch.testing.assert_close(rows[:, 3], torch.arange(7.0).sin())


def test_fixed_positions_stay() -> None:
    model = build("t2t")
    before = model.net.pos_embed.clone()
    init_mimetic(model)
    assert torch.equal(model.net.pos_embed, before)


def test_other_attention_is_rejected_before_anything_changes() -> None:
    model = build("convit")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"block blocks\.0 of this ConViT model has no plain"):
        init_mimetic(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
