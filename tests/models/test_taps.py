"""Taps: the right maps in the right order, under every wrapper, and no hooks left."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lg.models import Backbone, deit, feature_maps, resnet


def student(**changes: object) -> Backbone:
    torch.manual_seed(0)
    settings = {
        "img_size": 24,
        "num_classes": 10,
        "patch_size": 8,
        "hidden_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "mlp_ratio": 2.0,
    }
    model = deit(**{**settings, **changes})
    nn.init.normal_(model.net.head.weight)
    return model


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def gradients(model: nn.Module, indices: list[int]) -> list[torch.Tensor]:
    """Return the gradients of a loss on logits and maps."""
    logits, maps = feature_maps(model, images(), indices)
    loss = logits.square().mean() + sum(feature.square().mean() for feature in maps)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if grad is None else grad for grad in grads]


def test_maps_are_the_outputs_in_the_order_of_the_indices() -> None:
    model = student().eval()
    tokens = model.net.norm_pre(model.net._pos_embed(model.net.patch_embed(images())))
    expected = []
    for block in model.net.blocks:
        tokens = block(tokens)
        expected.append(tokens[:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2))
    logits, maps = feature_maps(model, images(), [3, 0, 3])
    torch.testing.assert_close(logits, model(images()))
    for index, feature in zip([3, 0, 3], maps, strict=True):
        assert feature.shape == (2, 16, 3, 3)
        torch.testing.assert_close(feature, expected[index])


def test_only_chosen_blocks_have_hooks_and_only_during_the_pass(monkeypatch) -> None:
    model = student()
    seen = []

    def count(*_: object) -> None:
        seen.append([len(block._forward_hooks) for block in model.blocks])

    handle = model.register_forward_pre_hook(count)
    feature_maps(model, images(), [2, 0])
    handle.remove()
    assert seen == [[1, 0, 1, 0]]
    assert hooks(model) == 0

    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(model.blocks[3], "forward", fail)
    with pytest.raises(RuntimeError, match="boom"):
        feature_maps(model, images(), [1])
    assert hooks(model) == 0


@pytest.mark.parametrize("index", [4, -1])
def test_indices_out_of_range_name_the_number_of_blocks(index: int) -> None:
    with pytest.raises(ValueError, match=rf"index {index} is out of range: the model has 4 blocks"):
        feature_maps(student(), images(), [0, index])


def test_only_token_maps_reject_images_of_another_size() -> None:
    with pytest.raises(ValueError, match="16 patch tokens where the model was built for 3 x 3"):
        student().to_map(0, torch.zeros(1, 17, 16))
    model = resnet(depth=8, img_size=32, num_classes=10).eval()
    assert feature_maps(model, torch.zeros(1, 3, 40, 40), [2])[1][0].shape == (1, 64, 10, 10)


def test_training_with_stochastic_depth() -> None:
    model = student(drop_path_rate=0.9).train()
    logits, maps = feature_maps(model, images(), [0, 3])
    assert logits.shape == (2, 10) and [m.shape for m in maps] == [(2, 16, 3, 3)] * 2
    (logits.mean() + maps[1].mean()).backward()
    assert model.net.patch_embed.proj.weight.grad.abs().sum() > 0


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain, checkpointed = student().train(), student().train()
    checkpointed.net.set_grad_checkpointing(True)
    expected = gradients(plain, [0, 2])
    for mine, theirs in zip(gradients(checkpointed, [0, 2]), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_distributed_data_parallel(tmp_path: os.PathLike[str]) -> None:
    expected = gradients(student().train(), [0, 3])
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = DistributedDataParallel(student().train())
        logits, maps = feature_maps(model, images(), [0, 3])
        (logits.square().mean() + sum(m.square().mean() for m in maps)).backward()
        for parameter, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    finally:
        dist.destroy_process_group()


def test_compiled_models_run_hooks_registered_later() -> None:
    model = student().eval()
    expected = {seed: feature_maps(model, images(seed), [0, 2]) for seed in (0, 1)}
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(0)), expected[0][0])
        for seed in (1, 0, 1):
            torch.testing.assert_close(feature_maps(compiled, images(seed), [0, 2]), expected[seed])
    model.compile(backend="eager")
    with torch.no_grad():
        model(images(0))
        torch.testing.assert_close(feature_maps(model, images(1), [0, 2]), expected[1])


def test_compiled_modules_can_use_taps_inside() -> None:
    class Guided(nn.Module):
        def __init__(self, model: Backbone) -> None:
            super().__init__()
            self.student = model

        def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            return feature_maps(self.student, batch, [0, 2])

    model = student().eval()
    guided = torch.compile(Guided(model), backend="eager")
    with torch.no_grad():
        for seed in (0, 1, 2):
            expected = feature_maps(model, images(seed), [0, 2])
            torch.testing.assert_close(guided(images(seed)), expected)


def test_blocks_are_registered_once_and_follow_copies() -> None:
    model = student()
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert len(list(model.parameters())) == len({*map(id, model.parameters())}) == 8 + 12 * 4
    assert [twin.blocks[i] is twin.net.blocks[i] for i in range(4)] == [True] * 4
    replaced = model.blocks[1]
    model.net.blocks[1] = copy.deepcopy(replaced)
    assert model.blocks[1] is model.net.blocks[1] is not replaced
    nn.init.zeros_(twin.net.patch_embed.proj.weight)
    ours, theirs = (feature_maps(m.eval(), images(), [0])[1][0] for m in (model, twin))
    assert not torch.allclose(ours, theirs)
