"""Guidance: a student with projection heads, a teacher or its stored maps, and the losses."""

from lg.guidance.feature_bank import FeatureBank
from lg.guidance.losses import GuidanceLoss, classification_loss, imitation_loss, logit_loss
from lg.guidance.student import GuidedStudent
from lg.guidance.teacher import FrozenTeacher, NoTeacher

__all__ = [
    "FeatureBank",
    "FrozenTeacher",
    "GuidanceLoss",
    "GuidedStudent",
    "NoTeacher",
    "classification_loss",
    "imitation_loss",
    "logit_loss",
]
