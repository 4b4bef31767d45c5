"""Taps: read the feature maps of chosen blocks while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from lg.models.backbone import Backbone, evaluating, unwrap


class PermanentTaps:
    """Hooks that stay on chosen blocks, so that compiled code contains them.

    They record only inside `run` and cost next to nothing otherwise.

    Args:
        model: The model.
        indices: Blocks to tap, counted from 0; any order, repeats allowed.

    Raises:
        ValueError: An index is out of range.
    """

    def __init__(self, model: Backbone, indices: Sequence[int]) -> None:
        model.check_indices(list(indices))
        self.indices = tuple(indices)
        self.outputs: dict[int, Any] = {}
        self._hooks = [_Hook(self.outputs, index) for index in dict.fromkeys(indices)]
        for hook in self._hooks:
            model.blocks[hook.index].register_forward_hook(hook)

    def run(self, model: Backbone, images: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        """Return the logits of images [B, C, H, W] and the maps, in the order of the indices."""
        self._activate(True)
        logits = model(images)
        # Activation checkpointing runs the blocks again in the backward pass; ignore those outputs.
        self._activate(False)
        maps = [model.to_map(index, self.outputs[index]) for index in self.indices]
        self.outputs.clear()
        return logits, maps

    def _activate(self, is_active: bool) -> None:
        for hook in self._hooks:
            hook.is_active = is_active


class _Hook:
    """Stores a block's output while it is active."""

    def __init__(self, outputs: dict[int, Any], index: int) -> None:
        self.outputs, self.index, self.is_active = outputs, index, False

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.is_active:
            self.outputs[self.index] = output


def _is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile(module)` or `module.compile()` compiled this module."""
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or "_orig_mod" in dict(module.named_children())


def map_shapes(
    model: nn.Module, indices: Sequence[int], *, image_size: int, in_channels: int
) -> list[tuple[int, int, int]]:
    """Run one image through `model` and return [C, H, W] of its maps; the model does not change.

    Args:
        model: As for `feature_maps`.
        indices: Blocks to tap.
        image_size: Height and width of the image in pixels.
        in_channels: Channels of the image.
    """
    device = next(model.parameters()).device
    image = torch.zeros(1, in_channels, image_size, image_size, device=device)
    with torch.random.fork_rng(devices=[]), evaluating(model):
        _, maps = feature_maps(model, image, indices)
    return [(m.shape[1], m.shape[2], m.shape[3]) for m in maps]


# Never part of compiled code, which ignores hooks that are registered later.
@torch.compiler.disable
def feature_maps(
    model: nn.Module, images: torch.Tensor, indices: Sequence[int]
) -> tuple[Any, list[torch.Tensor]]:
    """Run `model` once, uncompiled; return its logits and the maps [B, C, H, W] of some blocks.

    Args:
        model: A `Backbone`, bare or wrapped by DistributedDataParallel or torch.compile.
        images: [B, C, H, W].
        indices: Blocks, counted from 0; any order, repeats allowed. The maps come in this order.

    Raises:
        ValueError: An index is out of range.
    """
    backbone = unwrap(model)
    backbone.check_indices(list(indices))
    outputs: dict[int, Any] = {}

    def keep(index: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs[index] = output

    with ExitStack() as stack:
        if any(map(_is_compiled, model.modules())):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for index in dict.fromkeys(indices):
            hook = backbone.blocks[index].register_forward_hook(partial(keep, index))
            stack.callback(hook.remove)
        logits = model(images)
    return logits, [backbone.to_map(index, outputs[index]) for index in indices]
