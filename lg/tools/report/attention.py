"""Mean attention distance of each block and head, and attention maps of images.

Shapes: B images, M heads, Q queries, K keys, P prefix tokens, H x W map, S image side in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lg.models.attention import attention_maps
from lg.models.backbone import Backbone
from lg.models.taps import map_shapes

MIN_SIDE = 4  # maps with fewer positions per side are shown only if there is none finer
_BATCH = 8  # images at once; attention weights are large


@dataclass(frozen=True)
class SpatialAttention:
    """The attention of one block between image positions.

    Attributes:
        weights: [B, M, P + H * W, P + h * w]; rows sum to 1. Keys may lie on a coarser grid.
        prefix: P, class and similar tokens.
        size: H and W.
        key_size: h and w.
    """

    weights: Tensor
    prefix: int
    size: tuple[int, int]
    key_size: tuple[int, int]


def spatial_attention(model: Backbone, images: Tensor, index: int) -> SpatialAttention | None:
    """Return a block's attention between image positions; None if it has none.

    Convolutions, attention inside windows, and attention between channels have none.

    Args:
        model: The model.
        images: [B, C, S, S].
        index: Block, as INTER_STUDENT_INDEX counts.
    """
    try:
        weights = attention_maps(model, images, index).float()
    except ValueError:
        return None
    ((_, height, width),) = map_shapes(
        model, [index], image_size=images.shape[-1], in_channels=images.shape[1]
    )
    prefix = weights.shape[2] - height * width
    if len(weights) != len(images) or prefix not in (0, 1, model.layouts[index].prefix):
        return None
    side = math.isqrt(max(weights.shape[3] - prefix, 0))  # images are square
    if side == 0 or side * side != weights.shape[3] - prefix:
        return None
    return SpatialAttention(weights, prefix, (height, width), (side, side))


def distances(size: tuple[int, int], key_size: tuple[int, int], image_size: int) -> Tensor:
    """Return the distances in pixels between the centres of queries and keys, [H * W, h * w]."""
    return torch.cdist(_centres(size, image_size), _centres(key_size, image_size))


def _centres(size: tuple[int, int], image_size: int) -> Tensor:
    axes = ((torch.arange(count) + 0.5) * image_size / count for count in size)
    return torch.cartesian_prod(*axes).reshape(-1, 2)


def mean_distances(attention: SpatialAttention, image_size: int) -> Tensor:
    """Return the mean distance in pixels between query and key, [B, M].

    Keys count with their attention weights; prefix tokens, which have no position, are left out.
    """
    weights = attention.weights[:, :, attention.prefix :, attention.prefix :]
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    far = distances(attention.size, attention.key_size, image_size).to(weights.device)
    return (weights * far).sum(dim=-1).mean(dim=2).cpu()


@dataclass(frozen=True)
class BlockDistance:
    """The mean attention distance of a block.

    Attributes:
        block: Number of the block.
        heads: Mean distance of each head in pixels.
        uniform: The same if every query attended to all keys equally, pixels.
    """

    block: int
    heads: list[float]
    uniform: float

    @property
    def mean(self) -> float:
        """Mean over heads in pixels."""
        return sum(self.heads) / len(self.heads)


def block_distances(model: Backbone, images: Tensor) -> list[BlockDistance]:
    """Return the mean attention distance of each block with attention between positions.

    Args:
        model: In evaluation mode.
        images: [B, C, S, S], on the model's device.
    """
    size = images.shape[-1]
    found = []
    for index in range(len(model.blocks)):
        parts = [spatial_attention(model, part, index) for part in images.split(_BATCH)]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            continue
        mean = torch.cat([mean_distances(part, size) for part in known]).mean(dim=0)
        uniform = float(distances(known[0].size, known[0].key_size, size).mean())
        found.append(BlockDistance(index, mean.tolist(), uniform))
    return found


def image_attention(model: Backbone, images: Tensor) -> tuple[int, Tensor] | None:
    """Return the attention map of the last block that has one, averaged over heads.

    Blocks whose keys form a grid of at least MIN_SIDE x MIN_SIDE are preferred. The map is that of
    the class token, where there is one; otherwise the mean over all positions.

    Returns:
        (block, [B, h, w], each map from 0 to 1), or None if no block has such attention.
    """
    chosen: tuple[int, SpatialAttention] | None = None
    for index in reversed(range(len(model.blocks))):
        found = spatial_attention(model, images, index)
        is_fine = found is not None and min(found.key_size) >= MIN_SIDE
        if found is not None and (is_fine or chosen is None):
            chosen = index, found
        if is_fine:
            break
    if chosen is None:
        return None
    index, found = chosen
    weights = found.weights.mean(dim=1)[:, :, found.prefix :]
    seen = weights[:, 0] if found.prefix else weights.mean(dim=1)
    return index, _to_unit(seen.unflatten(1, found.key_size)).cpu()


def _to_unit(maps: Tensor) -> Tensor:
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)
