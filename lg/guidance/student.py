"""The student with its projection heads: everything that is trained, in one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lg.guidance.losses import KeptMap
from lg.guidance.mixture import MixedHeads
from lg.models.backbone import Backbone
from lg.models.taps import PermanentTaps


class GuidedStudent(nn.Module):
    """A student that also returns its tapped maps in training, projected to the teacher's channels.

    The heads run inside `forward`, so that one wrapper (DDP, compile, autocast) covers everything
    that is trained.

    Attributes:
        student: The model alone, which is tested, averaged and published.
        heads: 1x1 convolutions with bias, in tap order; empty without projection. `MixedHeads`
            bring the maps of all blocks to one map per guide stage.
    """

    def __init__(
        self,
        student: Backbone,
        *,
        indices: Sequence[int] = (),
        teacher_dims: Sequence[int] = (),
        mixed_heads: MixedHeads | None = None,
    ) -> None:
        """Add a head for each tapped block.

        Args:
            student: The model.
            indices: Blocks to tap, in the order of the teacher maps they imitate.
            teacher_dims: Channels of those teacher maps; empty for transforms without projection.
            mixed_heads: Heads of all blocks; replaces `indices` and `teacher_dims`.

        Raises:
            ValueError: The student lacks one of the blocks.
        """
        super().__init__()
        if mixed_heads is not None:
            indices = range(len(student.blocks))
        self.student = student
        self.indices = tuple(indices)
        self._taps = PermanentTaps(student, indices)
        dims = [student.feature_dims[i] for i in indices] if teacher_dims else []
        self.heads = mixed_heads or nn.ModuleList(
            nn.Conv2d(s, t, 1) for s, t in zip(dims, teacher_dims, strict=True)
        )

    def forward(
        self, images: Tensor, imitate: bool = True
    ) -> tuple[Tensor | tuple[Tensor, Tensor], list[Tensor] | list[KeptMap]] | Tensor:
        """Map images [N, C, S, S] to (logits [N, K], maps) in training and to logits in evaluation.

        In training, a student with a distillation token returns a pair of logits, and one that
        drops patches returns its maps at the positions that are left.

        Args:
            images: [N, C, S, S].
            imitate: Whether to compute the maps; False once guidance has ended. In training the
                heads then get gradients of 0 (see `drop_idle_gradients`).
        """
        if not self.training:
            return self.student(images)
        if not imitate:
            return self._with_idle_heads(self.student(images)), []
        logits, maps = self._taps.run(self.student, images)
        if isinstance(self.heads, MixedHeads):
            maps = self.heads(maps)
        elif self.heads:
            maps = [head(m) for head, m in zip(self.heads, maps, strict=True)]
        kept = self.student.kept
        if kept is not None:
            size = self.student.layouts[0].size
            return logits, [KeptMap(m, kept, size) for m in maps]
        return logits, maps

    def _with_idle_heads(self, logits: Any) -> Any:
        """Add 0 times the heads to logits: DDP waits for the gradient of every parameter."""
        if not self.heads:
            return logits
        first = logits[0] if isinstance(logits, tuple) else logits
        zero = 0 * torch.stack([p.sum() for p in self.heads.parameters()]).sum()
        first = first + zero.to(first.dtype)
        return (first, *logits[1:]) if isinstance(logits, tuple) else first

    def drop_idle_gradients(self) -> None:
        """Drop the gradients of heads that do not run, so that the optimiser leaves them alone.

        With gradients of 0, weight decay and momentum would still move them.
        """
        for parameter in self.heads.parameters():
            parameter.grad = None

    def mixture(self) -> list[list[float]]:
        """Return the weight of each block for each guide stage; empty without mixed heads."""
        return self.heads.weights().tolist() if isinstance(self.heads, MixedHeads) else []
