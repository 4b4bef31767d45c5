"""The losses of guided training: classification, imitation of feature maps, imitation of class
scores.

Shapes: N batch, C channels, H W map, K classes, T taps. All losses are computed in float32 whatever
the maps are stored in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TRANSFORMS = ("linear", "attention", "similarity")


def imitation_loss(student_map: Tensor, teacher_map: Tensor, transform: str = "linear") -> Tensor:
    """Mean squared difference of two feature maps after bringing them to one size and one
    description.

    Both maps are resized (bilinear, align_corners False) to the larger height and the larger width
    of the two.

    Args:
        student_map: [N, C, H, W]; for `linear` already projected to the teacher's channels.
        teacher_map: [N, C', H', W'].
        transform: `linear` compares the maps themselves (C = C'); `attention` their L2-normalised
            spatial energy, the channel mean of squares; `similarity` the L2-normalised rows of
            their N x N Gram matrices.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: unknown transform, or `linear` with differing channel counts, or differing batch
            sizes.

    Source: Locality Guidance, ECCV 2022, section 3.3; attention: arXiv 1612.03928; similarity:
    arXiv 1907.09682.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"transform is {transform!r}; allowed: {', '.join(TRANSFORMS)}.")
    if len(student_map) != len(teacher_map):
        raise ValueError(
            f"The student's maps are of {len(student_map)} images, the teacher's of "
            f"{len(teacher_map)}."
        )
    if transform == "linear" and student_map.shape[1] != teacher_map.shape[1]:
        raise ValueError(
            f"The projected student map has {student_map.shape[1]} channels, the teacher's "
            f"{teacher_map.shape[1]}; "
            "the projection head must produce the teacher's count."
        )
    size = (
        max(student_map.shape[2], teacher_map.shape[2]),
        max(student_map.shape[3], teacher_map.shape[3]),
    )
    student, teacher = (
        _describe(_resize(_widen(m), size), transform) for m in (student_map, teacher_map)
    )
    return F.mse_loss(student, teacher)


def logit_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, kind: str = "soft", temperature: float = 1.0
) -> Tensor:
    """Imitation of the teacher's class scores.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        kind: `soft`: KL divergence from the teacher's to the student's distribution, both at
            `temperature`, mean over the batch, times temperature^2 so that its gradient keeps its
            size; `hard`: cross-entropy with the teacher's argmax.
        temperature: > 0; `soft` only.

    Source: soft: arXiv 1503.02531; hard: arXiv 2012.12877.
    """
    if kind == "hard":
        return F.cross_entropy(_widen(student_logits), teacher_logits.argmax(dim=1))
    if kind != "soft":
        raise ValueError(f"kind is {kind!r}; allowed: soft, hard.")
    student = F.log_softmax(_widen(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(_widen(teacher_logits) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [N, K] with target distributions [N, K], mean over the batch."""
    return -(targets * F.log_softmax(_widen(logits), dim=1)).sum(dim=1).mean()


class GuidanceLoss:
    """Cross-entropy beside the imitation of a guide's feature maps and class scores.

    loss = (1 - w) * cls + w * logit + inter_weight * inter, where w = logit_weight, or 0 without
    logit imitation.
    """

    def __init__(
        self,
        *,
        transform: str = "linear",
        inter_weight: float = 0.0,
        logit_kind: str = "soft",
        temperature: float = 1.0,
        logit_weight: float = 0.0,
    ) -> None:
        self.transform = transform
        self.inter_weight = inter_weight
        self.logit_kind = logit_kind
        self.temperature = temperature
        self.logit_weight = logit_weight

    def __call__(
        self,
        logits: Tensor | tuple[Tensor, Tensor],
        student_maps: Sequence[Tensor],
        targets: Tensor,
        teacher_maps: Sequence[Tensor] = (),
        teacher_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes every term.

        Args:
            logits: [N, K], or the pair (class, distillation) of a student with a distillation
                token, whose second head then imitates the teacher while the first learns the
                labels.
            student_maps: T maps [N, C, H, W], projected where the transform is linear.
            targets: distributions over classes [N, K].
            teacher_maps: T maps, in the same order.
            teacher_logits: [N, K]; needed when logit_weight is above 0.

        Returns:
            `loss` (what to minimise) and its unweighted terms `cls`, `inter` (summed over taps) and
            `logit`; scalars, a term that is off is 0.
        """
        class_logits, imitating_logits = logits if isinstance(logits, tuple) else (logits, logits)
        cls = classification_loss(class_logits, targets)
        inter = logit = torch.zeros((), device=cls.device)
        loss = cls
        if self.logit_weight > 0:
            if teacher_logits is None:
                raise ValueError("Logit imitation is on, but the guide gives no class scores.")
            logit = logit_loss(
                imitating_logits, teacher_logits, kind=self.logit_kind, temperature=self.temperature
            )
            loss = (1 - self.logit_weight) * cls + self.logit_weight * logit
        if student_maps:
            pairs = zip(student_maps, teacher_maps, strict=True)
            inter = torch.stack([imitation_loss(s, t, self.transform) for s, t in pairs]).sum()
            loss = loss + self.inter_weight * inter
        return {"loss": loss, "cls": cls, "inter": inter, "logit": logit}


def _widen(tensor: Tensor) -> Tensor:
    """Half precision to float32; wider ones stay."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _resize(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(feature_map.shape[2:]) == size:
        return feature_map
    return F.interpolate(feature_map, size=size, mode="bilinear", align_corners=False)


def _describe(feature_map: Tensor, transform: str) -> Tensor:
    """What is compared: [N, C, H, W] (linear), [N, H*W] (attention) or [N, N] (similarity)."""
    if transform == "attention":
        return F.normalize(feature_map.square().mean(dim=1).flatten(1), dim=1)
    if transform == "similarity":
        rows = feature_map.flatten(1)
        return F.normalize(rows @ rows.T, dim=1)
    return feature_map
