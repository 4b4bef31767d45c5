"""Mixtures of blocks: their values against explicit sums, and what weight decay spares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lg
from lg.guidance import MixedHeads
from lg.optim import parameter_groups
from tests.builders.test_guided import tiny_config

SCORES = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]])
WEIGHTS = SCORES.exp() / SCORES.exp().sum(dim=1, keepdim=True)


def mixed(shapes: list[tuple[int, int, int]]) -> MixedHeads:
    torch.manual_seed(0)
    heads = MixedHeads(shapes, [(4, 6, 6), (2, 3, 3)])
    with torch.no_grad():
        heads.scores.copy_(SCORES.flatten())
    return heads


def test_weights_start_equal() -> None:
    heads = MixedHeads([(5, 4, 4)] * 4, [(4, 6, 6)])
    torch.testing.assert_close(heads.weights(), torch.full((1, 4), 0.25))


def test_blocks_of_one_shape_are_summed_and_then_projected() -> None:
    heads, maps = mixed([(5, 4, 4)] * 3), torch.randn(3, 2, 5, 4, 4)
    results = heads(list(maps))
    for stage, result in enumerate(results):
        total = sum(WEIGHTS[stage, block] * maps[block] for block in range(3))
        weight, bias = heads[stage].weight[:, :, 0, 0], heads[stage].bias
        expected = torch.einsum("kc,nchw->nkhw", weight, total) + bias[:, None, None]
        torch.testing.assert_close(result, expected)


def test_blocks_of_other_shapes_are_projected_and_resized_first() -> None:
    shapes = [(5, 12, 12), (5, 6, 6), (8, 3, 3)]
    heads, maps = mixed(shapes), [torch.randn(2, *shape) for shape in shapes]
    results = heads(maps)
    for stage, (first, last, side) in enumerate([(0, 4, 6), (4, 6, 3)]):
        total: torch.Tensor = torch.zeros(())
        for block, head in enumerate(heads):
            weight, bias = head.weight[first:last, :, 0, 0], head.bias[first:last]
            # Resizing before or after a 1x1 convolution gives the same.
            resized = F.interpolate(maps[block], size=(side, side), mode="bilinear")
            projected = torch.einsum("kc,nchw->nkhw", weight, resized) + bias[:, None, None]
            total = total + WEIGHTS[stage, block] * projected
        torch.testing.assert_close(results[stage], total)


@pytest.mark.filterwarnings("ignore:DISTILLATION.TEACHER_WEIGHTS is null")
@pytest.mark.parametrize(("kind", "num_heads"), [("DeiT", 2), ("PiT", 3), ("CvT", 3)])
def test_every_block_and_weight_learns(tmp_path: Path, kind: str, num_heads: int) -> None:
    torch.manual_seed(0)
    options = {"ENABLE_INTER": True, "INTER_STUDENT_INDEX": "mix", "INTER_TEACHER_INDEX": [0, 2]}
    guided, guide, loss = lg.build_guided(tiny_config(tmp_path / "run.yaml", kind, **options))
    assert len(guided.heads) == num_heads and guided.mixture() == [[pytest.approx(1 / 3)] * 3] * 2
    images = torch.randn(4, 3, 16, 16)
    logits, maps = guided.train()(images)
    assert [m.shape[1] for m in maps] == [16, 64]
    loss(logits, maps, torch.eye(10)[:4], *guide(images))["inter"].backward()
    for name, parameter in guided.heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(p.grad is not None for p in guided.student.blocks[-1].mlp.parameters())
    assert not any("scores" in name for name in lg.published_state_dict(guided.student))


def test_weight_decay_spares_the_weights() -> None:
    named = [(f"heads.{n}", p) for n, p in mixed([(5, 4, 4)] * 3).named_parameters()]
    groups = {
        g["name"]: g["parameter_names"]
        for g in parameter_groups(named, head_names=set(), weight_decay=0.1)
    }
    assert "heads.scores" in groups["body_no_decay"]
