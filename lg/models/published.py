"""Published names: the keys under which weights are stored, whatever a model calls them inside.

A family of models has one `KeyTable`. A pattern is the beginning of a dotted name; `{}` stands for
a number, and on the published side `{+1}` or `{-1}` for that number shifted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from lg.models.backbone import unwrap

_NUMBER = re.compile(r"\{([+-]\d+)?\}")
_SHOWN = 5  # keys named per kind of mismatch


@dataclass(frozen=True)
class KeyTable:
    """How the names of one family of models translate.

    Attributes:
        renames: Pairs (our pattern, published pattern). The first that fits a name replaces its
            beginning; a name that none fits is the same on both sides.
        order: Groups of published patterns, for networks that register their parts in another
            order than the published state dict. Keys go group by group; inside a group by the
            numbers, then by pattern, then in our order. Empty: our order.
    """

    renames: tuple[tuple[str, str], ...] = ()
    order: tuple[tuple[str, ...], ...] = ()

    def published(self, name: str) -> str:
        """Return the published name of `name`."""
        for ours, theirs in self.renames:
            match = _pattern(ours).match(name)
            if match:
                return _filled(theirs, match.groups()) + name[match.end() :]
        return name

    def rank(self, published: str) -> tuple[int, tuple[int, ...], int]:
        """Return the sort key of a published name."""
        for section, patterns in enumerate(self.order):
            for position, pattern in enumerate(patterns):
                match = _pattern(pattern).match(published)
                if match:
                    return section, tuple(map(int, match.groups())), position
        assert not self.order, f"no pattern of the table orders {published}"
        return 0, (), 0


@cache
def _pattern(text: str) -> re.Pattern[str]:
    """Compile a pattern: it ends where a part of the dotted name ends."""
    parts = [re.escape(part) for part in text.split("{}")]
    return re.compile(r"(\d+)".join(parts) + r"(?![^.])")


def _filled(text: str, numbers: tuple[str, ...]) -> str:
    """Return a published pattern with the numbers put in, shifted where it says so."""
    left = iter(numbers)
    return _NUMBER.sub(lambda place: str(int(next(left)) + int(place[1] or 0)), text)


TABLES: dict[str, KeyTable] = {
    "timm": KeyTable(),
    "DeiT": KeyTable(
        renames=(
            ("patch_embed.proj", "patch_embed.projection"),
            ("blocks.{}.attn.qkv", "layers.{}.attn.qkv_transform"),
            ("blocks.{}.attn.proj", "layers.{}.attn.projection"),
            ("blocks.{}", "layers.{}"),
            ("dist_token", "distill_token"),
            ("head_dist", "distill_head"),
        ),
    ),
    "T2TViT": KeyTable(
        renames=(
            ("layers.{}.attn.qkv", "layers.{}.attn.qkv_transform"),
            ("layers.{}.attn.proj", "layers.{}.attn.projection"),
        ),
    ),
    "PiT": KeyTable(
        renames=(
            ("transformers.{}.blocks.{}.attn.qkv", "transformers.{}.blocks.{}.attn.qkv_transform"),
            ("transformers.{}.blocks.{}.attn.proj", "transformers.{}.blocks.{}.attn.projection"),
            ("transformers.{}.pool", "pools.{-1}"),
        ),
        order=(
            ("pos_embed", "cls_token"),
            ("patch_embed",),
            ("transformers",),
            ("pools",),
            ("norm",),
            ("head",),
        ),
    ),
    "PVT": KeyTable(
        renames=(
            ("stages.{}.pos_embed", "pos_embed{+1}"),
            ("stages.{}.cls_token", "cls_token"),
            ("stages.{}.patch_embed", "patch_embed{+1}"),
            ("stages.{}.blocks", "block{+1}"),
        ),
        order=(
            ("pos_embed{}",),
            ("cls_token",),
            ("patch_embed{}", "block{}"),
            ("norm",),
            ("head",),
        ),
    ),
    "PVTv2": KeyTable(
        renames=(
            ("patch_embed", "patch_embed1"),
            ("stages.{}.downsample", "patch_embed{+1}"),
            ("stages.{}.blocks.{}.mlp.dwconv", "block{+1}.{}.mlp.dwconv.dwconv"),
            ("stages.{}.blocks", "block{+1}"),
            ("stages.{}.norm", "norm{+1}"),
        ),
    ),
    "ConViT": KeyTable(),
    "CvT": KeyTable(renames=(("stages.{}", "stage{}"),)),
    "ResNet": KeyTable(
        renames=(
            ("conv1", "stem.conv"),
            ("bn1", "stem.bn"),
            ("layer{}.{}.downsample.0", "s{}.b{+1}.proj"),
            ("layer{}.{}.downsample.1", "s{}.b{+1}.bn"),
            ("layer{}.{}.conv1", "s{}.b{+1}.f.a"),
            ("layer{}.{}.bn1", "s{}.b{+1}.f.a_bn"),
            ("layer{}.{}.conv2", "s{}.b{+1}.f.b"),
            ("layer{}.{}.bn2", "s{}.b{+1}.f.b_bn"),
            ("layer{}.{}.conv3", "s{}.b{+1}.f.c"),
            ("layer{}.{}.bn3", "s{}.b{+1}.f.c_bn"),
            ("fc", "head.fc"),
        ),
        order=(("stem",), ("s{}.b{}.proj", "s{}.b{}.bn", "s{}.b{}.f"), ("head",)),
    ),
}


def published_name(model: nn.Module, name: str) -> str:
    """Return the published name of a parameter or buffer.

    Args:
        model: A `Backbone`, bare or wrapped.
        name: As in `named_parameters()` of the bare `Backbone`.

    Raises:
        ValueError: The name is not one of a `Backbone`.
    """
    backbone = unwrap(model)
    if not name.startswith("net."):
        raise ValueError(
            f"{name!r} is not the name of a Backbone's parameter: take names from its "
            "named_parameters(), where each begins with 'net.'"
        )
    return TABLES[backbone.family].published(name.removeprefix("net."))


def published_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights under their published names and in the published order.

    The tensors share memory with the model, as those of `state_dict()` do.
    """
    backbone = unwrap(model)
    table = TABLES[backbone.family]
    state = backbone.net.state_dict()
    published = {table.published(name): tensor for name, tensor in state.items()}
    assert len(published) == len(state), f"two keys of {backbone.family} share a published name"
    return {name: published[name] for name in sorted(published, key=table.rank)}


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights and their published names."""
    digest = hashlib.sha256()
    for name, tensor in published_state_dict(model).items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_published_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load weights stored under published names; all of them or none.

    Raises:
        ValueError: Keys are missing, unexpected or of another shape. Nothing was loaded.
    """
    own = published_state_dict(model)
    missing = [name for name in own if name not in state_dict]
    unexpected = [str(name) for name in state_dict if name not in own]
    shapes = [
        f"{name} is {_describe(state_dict[name])}, the model has {_describe(tensor)}"
        for name, tensor in own.items()
        if name in state_dict and _describe(state_dict[name]) != _describe(tensor)
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    wrong = [f"{len(v)} {k}: {_shorten(v)}" for k, v in found.items() if v]
    if wrong:
        raise ValueError(
            f"the weights do not fit this {unwrap(model).family} model, nothing was loaded. "
            f"{'; '.join(wrong)}. Use the config the weights were trained with (MODEL.TYPE, "
            "NUM_CLASSES, IMG_SIZE, DEPTH, width)"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])


def _describe(value: Any) -> str:
    """Return the shape of a tensor, or the type of anything else, as text."""
    if isinstance(value, torch.Tensor):
        return str(list(value.shape))
    return f"a {type(value).__name__}"


def _shorten(names: list[str]) -> str:
    """Return the first few names and the mark of more."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
