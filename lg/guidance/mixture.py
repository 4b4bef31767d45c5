"""Heads that imitate each guide stage with a learned mixture of all blocks of the student.

Shapes: T guide stages, B blocks, N batch, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lg.guidance.resize import resize

Shape = tuple[int, int, int]  # C, H, W


class MixedHeads(nn.ModuleList):
    """For each guide stage, a softmax mixture of all blocks' maps and a 1x1 convolution.

    Blocks of one shape are mixed first, and each mixture is projected to the channels of its stage.
    Blocks of different shapes are projected first, each by one convolution to the channels of all
    stages; those of one shape are mixed, and the results are resized (bilinear, align_corners
    False) to the size of each stage's map and added. The weights start equal.

    Attributes:
        scores: [T * B], the weights before the softmax. A vector, which weight decay spares.
    """

    def __init__(self, shapes: Sequence[Shape], guide_shapes: Sequence[Shape]) -> None:
        """Create the heads.

        Args:
            shapes: Of the maps of the student's blocks, in order.
            guide_shapes: Of the guide's maps.
        """
        super().__init__()
        self.dims = [shape[0] for shape in guide_shapes]
        self.sizes = [shape[1:] for shape in guide_shapes]
        self.mixes_first = len(set(shapes)) == 1
        # Blocks of each shape.
        self._groups = [
            [block for block, each in enumerate(shapes) if each == shape]
            for shape in dict.fromkeys(shapes)
        ]
        if self.mixes_first:
            self.extend(nn.Conv2d(shapes[0][0], dim, 1) for dim in self.dims)
        else:
            self.extend(nn.Conv2d(shape[0], sum(self.dims), 1) for shape in shapes)
        self.scores = nn.Parameter(torch.zeros(len(guide_shapes) * len(shapes)))

    def weights(self) -> Tensor:
        """Return the weights [T, B]; rows sum to 1."""
        return self.scores.unflatten(0, (len(self.dims), -1)).softmax(dim=1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map the B maps [N, C, H, W] of the student to T maps with the channels of the stages."""
        weights = self.weights()
        if self.mixes_first:
            mixed = torch.einsum("tb,bnchw->tnchw", weights, torch.stack(list(maps)))
            return [head(m) for head, m in zip(self, mixed, strict=True)]
        mixtures = [
            [resize(part, size) for part, size in zip(parts, self.sizes, strict=True)]
            for parts in (self._project(group, maps, weights) for group in self._groups)
        ]
        return [torch.stack(parts).sum(dim=0) for parts in zip(*mixtures, strict=True)]

    def _project(
        self, group: Sequence[int], maps: Sequence[Tensor], weights: Tensor
    ) -> Sequence[Tensor]:
        """Project and mix blocks of one shape for all stages, by one convolution: resizing the sum
        is cheaper than adding resized maps, and gives the same."""
        dims = torch.tensor(self.dims, device=weights.device)
        scales = weights[:, list(group)].repeat_interleave(dims, dim=0, output_size=sum(self.dims))
        heads: list[Any] = [self[block] for block in group]
        kernels = [h.weight * s[:, None, None, None] for h, s in zip(heads, scales.T, strict=True)]
        biases = [h.bias * s for h, s in zip(heads, scales.T, strict=True)]
        stacked = torch.cat([maps[block] for block in group], dim=1)
        bias = torch.stack(biases).sum(dim=0)
        return F.conv2d(stacked, torch.cat(kernels, dim=1), bias).split(self.dims, dim=1)
