"""Mimetic initialisation: attention that starts with the structure that trained attention has.

Source: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", arXiv 2305.09828.
"""

from __future__ import annotations

import math

import torch
from timm.layers import Attention, build_sincos2d_pos_embed
from torch import Tensor, nn

from lg.models.backbone import Backbone

_QUERY_KEY = 0.7  # weight of the identity and of the noise in W_q W_k^T, as in the paper
_VALUE = 0.4  # the same in W_v W_proj, where the identity is negative


@torch.no_grad()
def init_mimetic(model: Backbone) -> None:
    """Draw the attention weights of every block, and set learned positions, in place.

    In each head, W_q W_k^T is the best approximation of its rank to 0.7 I + 0.7 Z, and W_v W_proj
    of the block is 0.4 Z - 0.4 I, where the entries of Z are normal with variance 1 / C. A singular
    value decomposition splits each product evenly. Learned positions become two-dimensional
    sinusoids; those of the class token and fixed positions stay.

    Raises:
        ValueError: A block has no plain multi-head attention, or the positions have a number of
            channels that is not a multiple of 4.
    """
    layers = []
    for name, block in zip(model.block_names, model.blocks, strict=True):
        found = [module for module in block.modules() if isinstance(module, Attention)]
        if len(found) != 1 or not _is_plain(found[0]):
            raise ValueError(
                f"block {name} of this {model.family} model has no plain multi-head attention"
            )
        layers += found
    for attention in layers:
        query, key, value = attention.qkv.weight.chunk(3)  # [C, C] each, heads in rows
        width, rank = len(value), attention.head_dim
        for first in range(0, width, rank):
            left, right = _factors(_QUERY_KEY, width, rank)
            query[first : first + rank], key[first : first + rank] = left.T, right.T
        left, right = _factors(-_VALUE, width, width)
        value.copy_(left.T)
        attention.proj.weight.copy_(right)
    _init_positions(model)


def _is_plain(attention: Attention) -> bool:
    square = attention.proj.in_features == attention.proj.out_features == attention.qkv.in_features
    return square and isinstance(attention.q_norm, nn.Identity)


def _factors(weight: float, width: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return A, B [width, rank] whose A B^T is closest to `weight` I + |`weight`| Z."""
    noise = torch.randn(width, width) / math.sqrt(width)
    left, values, right = torch.linalg.svd(weight * torch.eye(width) + abs(weight) * noise)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, right[:rank].T * roots


def _init_positions(model: Backbone) -> None:
    """Set learned positions, [1, P + N, C] or [1, C, H, W], to sinusoids of row and column."""
    positions = getattr(model.net, "pos_embed", None)
    if not isinstance(positions, nn.Parameter) or not positions.requires_grad:
        return
    is_map = positions.ndim == 4
    size = tuple(positions.shape[2:]) if is_map else model.layouts[0].size
    width = positions.shape[1] if is_map else positions.shape[2]
    if width % 4:
        raise ValueError(f"hidden_dim {width} is not a multiple of 4, as sinusoidal positions need")
    sinusoids = build_sincos2d_pos_embed(list(size), width)  # [N, C]
    if is_map:
        positions.copy_(sinusoids.T.unflatten(1, size))
    else:
        positions[:, -len(sinusoids) :] = sinusoids
