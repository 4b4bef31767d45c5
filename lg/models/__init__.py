"""Models: backbones whose blocks can be tapped, and their weights under published names."""

from __future__ import annotations

from lg.models.backbone import Backbone, MapLayout, unwrap
from lg.models.published import (
    load_published_state_dict,
    published_name,
    published_state_dict,
)
from lg.models.resnet import resnet
from lg.models.taps import FeatureTaps, feature_maps
from lg.models.timm_models import deit, timm_model

__all__ = [
    "Backbone",
    "FeatureTaps",
    "MapLayout",
    "deit",
    "feature_maps",
    "load_published_state_dict",
    "published_name",
    "published_state_dict",
    "resnet",
    "timm_model",
    "unwrap",
]
