"""Heads that imitate each guide stage with a learned mixture of all blocks of the student.

Shapes: T guide stages, B blocks, N batch, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]  # C, H, W


class MixedHeads(nn.ModuleList):
    """For each guide stage, a softmax mixture of all blocks' maps and a 1x1 convolution.

    Blocks of one shape are mixed first, and each mixture is projected to the channels of its stage.
    Blocks of different shapes are projected first, each by one convolution to the channels of all
    stages; the results are resized (bilinear, align_corners False) to the size of each stage's map
    and mixed then. The weights start equal.

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
        projected = [head(m).split(self.dims, dim=1) for head, m in zip(self, maps, strict=True)]
        stages = zip(weights, zip(*projected, strict=True), self.sizes, strict=True)
        return [
            torch.stack([w * _resize(m, size) for w, m in zip(row, parts, strict=True)]).sum(dim=0)
            for row, parts, size in stages
        ]


def _resize(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(feature_map, size=size, mode="bilinear", align_corners=False)
