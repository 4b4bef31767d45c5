"""Guidance: a student with projection heads, a frozen teacher, and the losses between them."""

from lg.guidance.losses import GuidanceLoss, classification_loss, imitation_loss, logit_loss
from lg.guidance.student import GuidedStudent
from lg.guidance.teacher import FrozenTeacher, NoTeacher

__all__ = [
    "FrozenTeacher",
    "GuidanceLoss",
    "GuidedStudent",
    "NoTeacher",
    "classification_loss",
    "imitation_loss",
    "logit_loss",
]
