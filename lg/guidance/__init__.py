"""Guidance: the student with its projection heads, the guides, and the losses."""

from lg.guidance.feature_bank import FeatureBank
from lg.guidance.losses import GuidanceLoss, classification_loss, imitation_loss, logit_loss
from lg.guidance.mixture import MixedHeads
from lg.guidance.schedule import GuidanceSchedule
from lg.guidance.student import GuidedStudent
from lg.guidance.teacher import FrozenTeacher, NoGuide
