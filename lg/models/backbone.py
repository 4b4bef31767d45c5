"""The common form of all models: a network, its blocks, and how to read their feature maps.

Shapes: B batch, N patch tokens, P prefix tokens (class, distillation, register), C channels,
H and W the map's height and width in patches or pixels of the map, K classes.

The functions that build the families (`deit`, `pvt`, ...) share these arguments. Families of
several stages take sequences of one entry per stage where their signature says so. Sizes that do
not fit together raise a ValueError that names the arguments.

    img_size: Height and width of the images in pixels; a multiple of `patch_size`, if the patches
        do not overlap.
    in_channels: Channels of the images.
    num_classes: K.
    patch_size: Height and width of a patch, in pixels of the stage's input.
    hidden_dim: C, a multiple of `num_heads`.
    depth: Number of blocks, 1 or more.
    num_heads: Attention heads of each block.
    mlp_ratio: Hidden width of the MLP over C.
    ln_eps: Added to the variance in LayerNorm.
    drop_rate: Dropout on the tokens after positions are added, after the projection of the
        attention, and in the MLP.
    drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
    attention_drop_rate: Dropout on the attention weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lg.models.key_table import KeyTable

_OWN_NAMES = KeyTable()


@dataclass(frozen=True)
class MapLayout:
    """How to read the map [B, C, H, W] from what one block returns.

    Attributes:
        kind: `nchw` for [B, C, H, W], `nhwc` for [B, H, W, C], `tokens` for [B, P + N, C].
        channels: C.
        prefix: P, tokens in front of the patch tokens; 0 unless `tokens`.
        size: H and W at the image size the model was built for. `tokens` only: outputs of the other
            kinds have a height and width of their own.
        item: Which item to take if the block returns a tuple or list; None if it returns a tensor.
    """

    kind: Literal["nchw", "nhwc", "tokens"]
    channels: int
    prefix: int = 0
    size: tuple[int, int] = (0, 0)
    item: int | None = None

    def to_map(self, output: Any, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Return the map [B, C, H, W] inside `output`; a view where the layout allows one.

        Args:
            output: What the block returned.
            kept: Positions of the patch tokens that were not dropped, [B, K]; the map is then
                [B, C, 1, K].

        Raises:
            ValueError: The number of tokens is not the one the model was built for.
        """
        tensor = output if self.item is None else output[self.item]
        if self.kind == "nchw":
            return tensor
        if self.kind == "nhwc":
            return tensor.permute(0, 3, 1, 2)
        height, width = self.size if kept is None else (1, kept.shape[1])
        tokens = tensor[:, self.prefix :]
        if tokens.shape[1] != height * width:
            raise ValueError(
                f"a block returned {tokens.shape[1]} patch tokens where the model was built for "
                f"{height} x {width}: use images of the size that the model was built for"
            )
        return tokens.transpose(1, 2).reshape(tensor.shape[0], self.channels, height, width)


class Backbone(nn.Module):
    """A network with numbered blocks; `model(images) -> logits`.

    The attribute `net` holds the network, with the parameter names of its library; files on disk
    use the published names (`lg.models.published`).

    Args:
        net: Images [B, C, H, W] to logits [B, K].
        family: Name for messages, for example `DeiT` or `timm`.
        keys: Published names of the parameters; by default their own names.
        block_names: Names of the blocks inside `net`, in forward order.
        layouts: How to read the map of each block.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        family: str,
        keys: KeyTable = _OWN_NAMES,
        block_names: Sequence[str],
        layouts: Sequence[MapLayout],
    ) -> None:
        super().__init__()
        assert len(block_names) == len(layouts) > 0
        self.net = net
        self.family = family
        self.keys = keys
        self.block_names = tuple(block_names)
        self.layouts = tuple(layouts)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in forward order, as INTER_STUDENT_INDEX counts them.

        They are looked up by name at each call: a ModuleList would add every key to the state dict
        a second time, and a plain list would be out of date after a block is replaced.
        """
        return [self.net.get_submodule(name) for name in self.block_names]

    @property
    def feature_dims(self) -> list[int]:
        """Channels of each block's map."""
        return [layout.channels for layout in self.layouts]

    def check_indices(self, indices: Sequence[int]) -> None:
        """Reject indices that are not those of a block.

        Raises:
            ValueError: The message names the index and the number of blocks.
        """
        count = len(self.block_names)
        wrong = [index for index in indices if not 0 <= index < count]
        if wrong:
            raise ValueError(
                f"block index {', '.join(map(str, wrong))} is out of range: the model has {count} "
                f"blocks, numbered 0 to {count - 1}"
            )

    def head_names(self) -> set[str]:
        """Return the names of the classifier's parameters, as in `named_parameters()`.

        A distilled model has two classifiers.
        """
        found: Any = self.net.get_classifier()  # type: ignore[operator]
        heads = found if isinstance(found, (tuple, list)) else [found]
        mine = {id(parameter) for head in heads for parameter in head.parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in mine}

    @property
    def kept(self) -> torch.Tensor | None:
        """Positions [B, K] of the patches that the last pass kept; None if it dropped none."""
        return getattr(getattr(self.net, "patch_drop", None), "kept", None)

    def to_map(self, index: int, output: Any) -> torch.Tensor:
        """Return the map of what block `index` returned in the last pass.

        It is [B, C, H, W], or [B, C, 1, K] if the pass dropped patches (see `kept`).
        """
        return self.layouts[index].to_map(output, self.kept)

    def forward(self, images: torch.Tensor) -> Any:
        """Return logits [B, K]; a distilled model in training returns a pair of them."""
        return self.net(images)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without gradients; restore each module's mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def unwrap(model: nn.Module) -> Backbone:
    """Return the `Backbone` inside DistributedDataParallel and `torch.compile` wrappers.

    Raises:
        ValueError: There is none.
    """
    inner: Any = model
    while not isinstance(inner, Backbone):
        # `_orig_mod` first: a compiled module forwards unknown attributes to the wrapped module.
        children = dict(inner.named_children()) if isinstance(inner, nn.Module) else {}
        inner = children.get("_orig_mod", children.get("module"))
        if inner is None:
            raise ValueError(
                f"{type(model).__name__} is not a Backbone: build it with lg.models, bare or "
                "wrapped by DistributedDataParallel or torch.compile"
            )
    return inner


def probe_layouts(
    net: nn.Module, names: Sequence[str], *, image_shape: tuple[int, int, int]
) -> dict[str, MapLayout | None]:
    """Run one image through `net` and infer how each named module returns its map.

    The network does not change: evaluation mode keeps BatchNorm statistics, the mode of each module
    is restored, and the random state stays.

    Args:
        net: The network to run.
        names: Modules to watch.
        image_shape: Channels, height and width of the image; height equals width.

    Returns:
        Layouts in the order in which the modules first ran. The layout is None if the output holds
        no map, or a map that the network overwrites in place. Modules that did not run are absent.
    """
    seen: dict[str, tuple[Any, list[int]]] = {}

    def remember(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.setdefault(name, (output, _versions_of(output)))

    # Noise: some normalisations turn a constant image into NaN.
    image = torch.randn((1, *image_shape), generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        for name in names:
            hook = net.get_submodule(name).register_forward_hook(partial(remember, name))
            stack.callback(hook.remove)
        with torch.random.fork_rng(devices=[]), evaluating(net):
            net(image.to(next(net.parameters()).device))
    prefix = getattr(net, "num_prefix_tokens", 0)
    # If a later module overwrites an output in place, a tap would read the wrong values.
    outputs = {
        name: output if _versions_of(output) == versions else None
        for name, (output, versions) in seen.items()
    }
    layouts = {name: _layout_of(output, prefix=prefix) for name, output in outputs.items()}
    return _settle_cubes(layouts, outputs)


def _versions_of(output: Any) -> list[int]:
    """Return how often each tensor of an output was written to in place."""
    items = output if isinstance(output, (tuple, list)) else [output]
    return [item._version for item in items if isinstance(item, torch.Tensor)]


def _layout_of(output: Any, *, prefix: int) -> MapLayout | None:
    """Return the layout that fits one image's output, or one item of a tuple; None for no map.

    The image is square, so its map is square, which tells the layouts apart.
    """
    if isinstance(output, (tuple, list)):
        layouts = [_layout_of(item, prefix=prefix) for item in output]
        found = ((item, layout) for item, layout in enumerate(layouts) if layout is not None)
        return next((replace(layout, item=item) for item, layout in found), None)
    if not isinstance(output, torch.Tensor) or output.ndim not in (3, 4) or len(output) != 1:
        return None
    _, first, second, *rest = output.shape
    if not rest:
        return _token_layout(first, second, prefix=prefix)
    if second == rest[0]:
        return MapLayout("nchw", first)
    return MapLayout("nhwc", rest[0]) if first == second else None


def _token_layout(num_tokens: int, channels: int, *, prefix: int) -> MapLayout | None:
    """Return the layout of [1, P + N, C]; P is `prefix` or, if that does not fit, the smallest."""
    if num_tokens in (1, prefix):
        return None  # prefix tokens alone, as in class attention; not every net has `prefix`
    for candidate in (prefix, *range(num_tokens)):
        side = math.isqrt(max(num_tokens - candidate, 0))
        if side > 0 and side * side == num_tokens - candidate:
            return MapLayout("tokens", channels, candidate, (side, side))
    return None


def _settle_cubes(
    layouts: dict[str, MapLayout | None], outputs: dict[str, Any]
) -> dict[str, MapLayout | None]:
    """Read [1, D, D, D], which fits both image layouts, in the layout of the net's other blocks."""
    cubes = [
        name
        for name, output in outputs.items()
        if isinstance(output, torch.Tensor) and output.ndim == 4 and len(set(output.shape[1:])) == 1
    ]
    kinds = {v.kind for n, v in layouts.items() if v is not None and n not in cubes} - {"tokens"}
    if kinds == {"nhwc"}:
        layouts |= {name: MapLayout("nhwc", outputs[name].shape[3]) for name in cubes}
    return layouts
