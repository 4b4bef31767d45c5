"""Taps: read the feature maps of chosen blocks while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lg.models.backbone import Backbone, evaluating, unwrap


class FeatureTaps:
    """Record the outputs of chosen blocks inside a `with` block.

        with FeatureTaps(model, [0, 6, 11]) as taps:
            logits = model(images)
            maps = taps.maps()

    Only the chosen blocks get hooks. On exit the hooks are removed and the outputs released, so
    read the maps inside. A compiled `model` runs uncompiled inside, because compiled code ignores
    hooks that are registered later.

    Args:
        model: A `Backbone`, bare or wrapped by DistributedDataParallel or torch.compile.
        indices: Blocks to tap, counted from 0; any order, repeats allowed.

    Raises:
        ValueError: An index is out of range.
    """

    def __init__(self, model: nn.Module, indices: Sequence[int]) -> None:
        self._backbone = unwrap(model)
        self._compiled = any(map(_is_compiled, model.modules()))
        self._indices = list(indices)
        self._outputs: dict[int, Any] = {}
        self._cleanup = ExitStack()
        self._backbone.check_indices(self._indices)

    def __enter__(self) -> FeatureTaps:
        with ExitStack() as stack:
            stack.callback(self._outputs.clear)
            if self._compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            # Each pass replaces the outputs of the one before.
            forget = self._backbone.net.register_forward_pre_hook(lambda *_: self._outputs.clear())
            stack.callback(forget.remove)
            blocks = self._backbone.blocks
            for index in dict.fromkeys(self._indices):
                handle = blocks[index].register_forward_hook(self._hook(index))
                stack.callback(handle.remove)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def maps(self) -> list[torch.Tensor]:
        """Return the maps [B, C, H, W] of the last pass, in the order of the indices."""
        missing = [index for index in self._indices if index not in self._outputs]
        assert not missing, f"blocks {missing} have not run: read the maps after the forward pass"
        return [self._backbone.to_map(index, self._outputs[index]) for index in self._indices]

    def _hook(self, index: int) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # Keep the first call's output: activation checkpointing runs the block again in the
            # backward pass, and the loss does not depend on that copy.
            self._outputs.setdefault(index, output)

        return keep


class PermanentTaps:
    """Hooks that stay on chosen blocks, so that compiled code contains them.

    They record only while `run` runs, and cost next to nothing else.

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
        model: As for `FeatureTaps`.
        indices: Blocks to tap.
        image_size: Height and width of the image in pixels.
        in_channels: Channels of the image.
    """
    device = next(model.parameters()).device
    image = torch.zeros(1, in_channels, image_size, image_size, device=device)
    with torch.random.fork_rng(devices=[]), evaluating(model):
        _, maps = feature_maps(model, image, indices)
    return [(m.shape[1], m.shape[2], m.shape[3]) for m in maps]


# Not compiled, for the same reason, even when compiled code calls it.
@torch.compiler.disable
def feature_maps(
    model: nn.Module, images: torch.Tensor, indices: Sequence[int]
) -> tuple[Any, list[torch.Tensor]]:
    """Run `model` once and return its logits and the maps [B, C, H, W] of blocks `indices`.

    Args:
        model: As for `FeatureTaps`.
        images: [B, C, H, W].
        indices: Blocks to tap; the maps come in this order.

    Raises:
        ValueError: An index is out of range.
    """
    with FeatureTaps(model, indices) as taps:
        logits = model(images)
        return logits, taps.maps()
