"""The losses of guided training: classification, imitation of feature maps and of logits.

Shapes: N batch, C channels, H W map, K classes, T taps. Half precision is widened to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lg.guidance.resize import resize

TRANSFORMS = ("linear", "gram", "attention", "similarity")
PROJECTED = ("linear", "gram")  # transforms of maps that 1x1 heads bring to the teacher's channels


class KeptMap(NamedTuple):
    """A student's map at the positions of the patches that it has not dropped.

    Attributes:
        features: [N, C, 1, P].
        positions: [N, P], in the grid of all patches, row by row.
        size: Height and width of that grid.
    """

    features: Tensor
    positions: Tensor
    size: tuple[int, int]

    def gather(self, teacher_map: Tensor) -> Tensor:
        """Resize a map [N, C', H', W'] to the grid and return its values [N, C', 1, P] there."""
        grid = resize(teacher_map, self.size).flatten(2)
        index = self.positions.unsqueeze(1).expand(-1, grid.shape[1], -1)
        return grid.gather(2, index).unsqueeze(2)


def imitation_loss(student_map: Tensor, teacher_map: Tensor, transform: str = "linear") -> Tensor:
    """Return the mean squared difference of two feature maps after a resize and a transform.

    Both maps are resized (bilinear, align_corners False) to the larger height and the larger width
    of the two, except for `gram`, which averages over positions.

    Args:
        student_map: [N, C, H, W]; for `linear` and `gram` already projected to the teacher's
            channels.
        teacher_map: [N, C', H', W'].
        transform: `linear` compares the maps themselves (C = C'); `gram` the C x C Gram matrices
            of each image's channels, divided by H W (C = C'); `attention` the L2-normalised
            channel mean of squares; `similarity` the L2-normalised rows of the N x N Gram
            matrices.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: The transform is unknown, the batch sizes differ, or the channels differ with
            `linear` or `gram`.

    Source: Locality Guidance, ECCV 2022, section 3.3; gram: arXiv 1508.06576; attention: arXiv
    1612.03928; similarity: arXiv 1907.09682.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"transform is {transform!r}; allowed: {', '.join(TRANSFORMS)}.")
    if len(student_map) != len(teacher_map):
        raise ValueError(
            f"student_map holds {len(student_map)} images, teacher_map {len(teacher_map)}; they "
            "must hold the same images."
        )
    if transform in PROJECTED and student_map.shape[1] != teacher_map.shape[1]:
        raise ValueError(
            f"student_map has {student_map.shape[1]} channels, teacher_map "
            f"{teacher_map.shape[1]}; project the student's map to the teacher's channels."
        )
    both = _widen(student_map), _widen(teacher_map)
    if transform != "gram":
        size = max(m.shape[2] for m in both), max(m.shape[3] for m in both)
        both = resize(both[0], size), resize(both[1], size)
    student, teacher = (_transform(m, transform) for m in both)
    return F.mse_loss(student, teacher)


def logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "soft",
    temperature: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Return the loss of imitating the teacher's logits.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        kind: `soft`: KL divergence of the student's distribution from the teacher's, both at
            `temperature`, averaged over the batch and multiplied by temperature^2, which keeps the
            scale of its gradient; `hard`: cross-entropy with the teacher's argmax.
        temperature: > 0; `soft` only.
        standardize: Replace the logits of each image by their z-scores, (logit - mean) / standard
            deviation over classes, so that only their relations are imitated, not their scale;
            `soft` only.

    Raises:
        ValueError: The kind is unknown.

    Source: soft: arXiv 1503.02531; hard: arXiv 2012.12877; standardize: arXiv 2403.01427.
    Departure: 1e-5 is added to the variance, because classifiers start at zero here, where equal
    logits have no z-score.
    """
    if kind == "hard":
        return F.cross_entropy(_widen(student_logits), teacher_logits.argmax(dim=1))
    if kind != "soft":
        raise ValueError(f"kind is {kind!r}; allowed: soft, hard.")
    scores = [_widen(student_logits), _widen(teacher_logits)]
    if standardize:
        scores = [F.layer_norm(s, s.shape[1:], eps=1e-5) for s in scores]
    student, teacher = (F.log_softmax(s / temperature, dim=1) for s in scores)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def classification_loss(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of logits [N, K] with target distributions [N, K], batch mean, each
    class weighted by `class_weights` [K] if given."""
    if class_weights is not None:
        targets = targets * class_weights
    # reduction="mean" sums all elements at once, which rounds differently.
    return F.cross_entropy(_widen(logits), targets, reduction="none").mean()


@dataclass(frozen=True, kw_only=True)
class GuidanceLoss:
    """Cross-entropy and the imitation of a guide's feature maps and logits.

    loss = (1 - logit_weight) * cls + logit_weight * logit + inter_weight * inter

    A `factor` below 1 weakens the guide: the imitation of maps is multiplied by it, and the
    imitating logits are trained on the guide with weight `factor` and on the labels with weight
    1 - `factor`.

    Attributes:
        transform: See `imitation_loss`.
        inter_weight: Weight of the imitation of feature maps, >= 0.
        logit_kind: See `logit_loss`.
        temperature: See `logit_loss`.
        standardize: See `logit_loss`.
        logit_weight: Weight of the imitation of logits, 0 to 1; 0 turns it off.
        class_weights: Weights of the classes in the cross-entropy, [K] on the device of the logits;
            None weights all equally.
    """

    transform: str = "linear"
    inter_weight: float = 0.0
    logit_kind: str = "soft"
    temperature: float = 1.0
    standardize: bool = False
    logit_weight: float = 0.0
    class_weights: Tensor | None = None

    def __call__(
        self,
        logits: Tensor | tuple[Tensor, Tensor],
        student_maps: Sequence[Tensor | KeptMap],
        targets: Tensor,
        teacher_maps: Sequence[Tensor] = (),
        teacher_logits: Tensor | None = None,
        *,
        factor: float = 1.0,
    ) -> dict[str, Tensor]:
        """Compute every term.

        Args:
            logits: [N, K]; or the pair (class, distillation) of a student with a distillation
                token: the first learns the labels, the second imitates the teacher.
            student_maps: T maps [N, C, H, W], already projected for a transform in `PROJECTED`; of
                a student that drops patches, the positions that are left are compared.
            targets: Distributions over classes [N, K].
            teacher_maps: T maps, in the same order.
            teacher_logits: [N, K]; required if `logit_weight` and `factor` are above 0.
            factor: Of guidance, 0 to 1; at 0 there are no maps, and `inter` and `logit` are 0.

        Returns:
            `loss`, the value to minimise, and its unweighted terms `cls`, `inter` (summed over
            taps) and `logit`; scalars, 0 for a term that is off.

        Raises:
            ValueError: The guide returned no logits to imitate, or another number of maps.
        """
        class_logits, imitating_logits = logits if isinstance(logits, tuple) else (logits, logits)
        cls = classification_loss(class_logits, targets, self.class_weights)
        inter = logit = torch.zeros((), device=cls.device)
        loss = cls
        if self.logit_weight > 0 and factor > 0:
            if teacher_logits is None:
                raise ValueError(
                    f"logit_weight is {self.logit_weight}, but the guide returned no logits."
                )
            logit = logit_loss(
                imitating_logits,
                teacher_logits,
                kind=self.logit_kind,
                temperature=self.temperature,
                standardize=self.standardize,
            )
        if self.logit_weight > 0:
            learned = logit
            if factor < 1:
                labelled = classification_loss(imitating_logits, targets, self.class_weights)
                learned = factor * logit + (1 - factor) * labelled
            loss = (1 - self.logit_weight) * cls + self.logit_weight * learned
        if student_maps:
            pairs = zip(student_maps, teacher_maps, strict=True)
            inter = torch.stack([self._imitation(s, t) for s, t in pairs]).sum()
            loss = loss + factor * self.inter_weight * inter
        return {"loss": loss, "cls": cls, "inter": inter, "logit": logit}

    def _imitation(self, student_map: Tensor | KeptMap, teacher_map: Tensor) -> Tensor:
        if isinstance(student_map, KeptMap):
            teacher_map = student_map.gather(teacher_map)
            student_map = student_map.features
        return imitation_loss(student_map, teacher_map, self.transform)


def _widen(tensor: Tensor) -> Tensor:
    """Convert half precision to float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _transform(feature_map: Tensor, transform: str) -> Tensor:
    """Return what is compared.

    Shapes: [N, C, H, W] (linear), [N, C, C] (gram), [N, H*W] (attention), [N, N] (similarity).
    """
    if transform == "gram":
        channels = feature_map.flatten(2)
        return channels @ channels.mT / channels.shape[2]
    if transform == "attention":
        return F.normalize(feature_map.square().mean(dim=1).flatten(1), dim=1)
    if transform == "similarity":
        rows = feature_map.flatten(1)
        return F.normalize(rows @ rows.T, dim=1)
    return feature_map
