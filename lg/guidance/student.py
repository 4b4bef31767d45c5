"""The student with its projection heads: all that is trained, in one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lg.models.backbone import Backbone
from lg.models.taps import FeatureTaps


class _Tap:
    """A forward hook that stays, so that compiled code sees it; it keeps what a block returns while
    the student listens."""

    def __init__(self, kept: dict[int, Any], index: int) -> None:
        self.kept, self.index, self.listening = kept, index, False

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.listening:
            self.kept[self.index] = output


class GuidedStudent(nn.Module):
    """A model whose blocks are tapped in training and whose maps are projected to the teacher's
    channels.

    Heads run inside `forward`, so that one wrapper (DDP, compile, autocast) covers everything that
    learns.

    Attributes:
        student: the model alone; what is tested, averaged and published.
        heads: 1x1 convolutions with bias, in tap order; empty when maps are compared without
            projection.
    """

    def __init__(
        self, student: Backbone, *, indices: Sequence[int] = (), teacher_dims: Sequence[int] = ()
    ) -> None:
        """Adds one head for each tapped block.

        Args:
            student: the model.
            indices: blocks to tap, in the order of the teacher maps they are compared with.
            teacher_dims: channels of those teacher maps; empty for transforms that need no
                projection.
        """
        super().__init__()
        FeatureTaps(student, indices)  # refuses indices that the model does not have
        self.student = student
        self.indices = tuple(indices)
        self._kept: dict[int, Any] = {}
        self._taps = [_Tap(self._kept, index) for index in dict.fromkeys(indices)]
        for tap in self._taps:
            student.blocks[tap.index].register_forward_hook(tap)
        dims = [student.feature_dims[i] for i in indices] if teacher_dims else []
        self.heads = nn.ModuleList(
            nn.Conv2d(s, t, 1) for s, t in zip(dims, teacher_dims, strict=True)
        )

    def forward(
        self, images: Tensor
    ) -> tuple[Tensor | tuple[Tensor, Tensor], list[Tensor]] | Tensor:
        """Images [N, 3, S, S] to (logits [N, K], maps) in training, to logits [N, K] in evaluation.

        A student with a distillation token gives a pair of logits in training.
        """
        if not self.training:
            return self.student(images)
        if not self.indices:
            return self.student(images), []
        self._listen(True)
        logits = self.student(images)
        # Not beyond this pass: activation checkpointing runs blocks again in the backward pass, and
        # that copy is not the one the loss hangs on.
        self._listen(False)
        maps = [self.student.to_map(index, self._kept[index]) for index in self.indices]
        self._kept.clear()
        if self.heads:
            maps = [head(m) for head, m in zip(self.heads, maps, strict=True)]
        return logits, maps

    def _listen(self, listening: bool) -> None:
        for tap in self._taps:
            tap.listening = listening
