"""Models: backbones with blocks that can be tapped, and weights under published names."""

from lg.models.backbone import Backbone, MapLayout, unwrap
from lg.models.convit import convit
from lg.models.cvt import cvt
from lg.models.deit import deit
from lg.models.pit import pit
from lg.models.published import load_published_state_dict, published_state_dict
from lg.models.pvt import pvt
from lg.models.pvtv2 import pvtv2
from lg.models.resnet import resnet
from lg.models.t2t import t2t
from lg.models.taps import feature_maps
from lg.models.timm_models import timm_model
