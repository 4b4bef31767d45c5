"""Published names: the keys under which weights are stored, whatever a model calls them inside."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lg.errors import first_few
from lg.models.backbone import unwrap


def published_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights under their published names and in the published order.

    The tensors share memory with the model, like those of `state_dict()`.
    """
    backbone = unwrap(model)
    table = backbone.keys
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
    """Load weights stored under published names, strictly.

    Raises:
        ValueError: Keys are missing, unexpected or of another shape. Nothing is loaded then.
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
    wrong = [f"{len(v)} {k}: {first_few(v)}" for k, v in found.items() if v]
    if wrong:
        raise ValueError(
            f"the weights do not fit this {unwrap(model).family} model, nothing was loaded. "
            f"{'; '.join(wrong)}. Use the config of the weights (type, classes, channels, "
            "image size, depth, width)"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])


def _describe(value: Any) -> str:
    """Return the shape of a tensor, or the type of anything else, as text."""
    if isinstance(value, torch.Tensor):
        return str(list(value.shape))
    return f"a {type(value).__name__}"
