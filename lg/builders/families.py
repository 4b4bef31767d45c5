"""The transformer families by name, built from the settings that a config gives them.

Settings carry the names of the config's keys; each family's function takes them in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode

from lg import models
from lg.config.rules import FAMILIES
from lg.errors import ConfigError
from lg.models.backbone import Backbone
from lg.models.resnet import resnet

Settings = Mapping[str, Any]

# Values of unset rates.
_UNSET = {"DROP_RATE": 0.0, "DROP_PATH_RATE": 0.0, "ATTENTION_DROP_RATE": 0.0}
# Keys that a family can do without: T2T.STRIDE implies the size of a patch.
_OPTIONAL = {("T2TViT", "PATCH_SIZE")}


def build_family(kind: str, transformer: Settings, own: Settings, **sizes: Any) -> Backbone:
    """Return a model of the family `kind`.

    Args:
        kind: A name in `FAMILIES`, as in MODEL.TYPE.
        transformer: The settings of the section TRANSFORMER.
        own: Those of the family's own section, empty if it has none.
        **sizes: Image size, channels, classes, and other arguments of the family's function.

    Raises:
        ConfigError: A setting is missing, a list instead of a number, or of the wrong length.
        ValueError: The sizes do not fit together. The message names the function's arguments.
    """
    family = FAMILIES[kind]
    arguments = {"ln_eps": transformer["LN_EPS"], **sizes}
    for name in family.one:
        arguments[name.lower()] = single(kind, transformer, name)
    arguments |= {name.lower(): value for name, value in own.items()}
    if family.stages:
        # HIDDEN_DIM is the list that counts the stages.
        widths = transformer["HIDDEN_DIM"]
        num_stages = len(widths) if isinstance(widths, list) else 0
        for name in family.stages:
            arguments[name.lower()] = _per_stage(kind, transformer, name, num_stages)
        for name, value in own.items():
            if isinstance(value, list):
                _check_length(f"{family.section}.{name}", value, num_stages)
    return getattr(models, family.function)(**arguments)


def with_keys(message: str, keys: Mapping[str, str]) -> str:
    """Return the message of a model's error with config keys in place of the argument names."""
    names = "|".join(map(re.escape, keys))
    return re.sub(rf"\b({names})\b", lambda match: keys[match[0]], message)


def single(kind: str, transformer: Settings, name: str) -> Any:
    """Return TRANSFORMER.<name> of a model that takes one number.

    Raises:
        ConfigError: It is a list, or not set.
    """
    value = _value_of(transformer, name)
    if isinstance(value, list) or (value is None and (kind, name) not in _OPTIONAL):
        raise ConfigError(f"TRANSFORMER.{name} is {value!r}; MODEL.TYPE {kind} takes one number.")
    return value


def _value_of(transformer: Settings, name: str) -> Any:
    """Return TRANSFORMER.<name>, or what stands for null."""
    return _UNSET.get(name) if transformer[name] is None else transformer[name]


def _per_stage(kind: str, transformer: Settings, name: str, num_stages: int) -> list[Any]:
    """Return TRANSFORMER.<name> for each stage; a single number applies to every stage."""
    value = _value_of(transformer, name)
    if isinstance(value, (int, float)) and num_stages:
        return [value] * num_stages
    if not isinstance(value, list) or not value:
        raise ConfigError(
            f"TRANSFORMER.{name} is {value!r}; MODEL.TYPE {kind} takes a list, one entry per stage."
        )
    _check_length(f"TRANSFORMER.{name}", value, num_stages)
    return value


def _check_length(key: str, values: list[Any], num_stages: int) -> None:
    if len(values) != num_stages:
        raise ConfigError(
            f"{key} is {values}, but TRANSFORMER.HIDDEN_DIM has {num_stages} stages: give one "
            "entry per stage."
        )


def build_resnet(cfg: CfgNode, **sizes: int) -> Backbone:
    """Return the ResNet that CNN and RESNET describe."""
    return resnet(
        depth=cfg.CNN.DEPTH,
        **sizes,
        num_groups=cfg.RESNET.NUM_GROUPS,
        width_per_group=cfg.RESNET.WIDTH_PER_GROUP,
        stride_1x1=cfg.RESNET.STRIDE_1X1,
        activation=cfg.CNN.ACTIVATION_FUN,
        activation_inplace=cfg.CNN.ACTIVATION_INPLACE,
        bn_eps=cfg.CNN.BN_EPS,
        bn_momentum=cfg.CNN.BN_MOMENTUM,
        zero_init_final_bn_gamma=cfg.CNN.ZERO_INIT_FINAL_BN_GAMMA,
    )


def model_sizes(cfg: CfgNode, img_size: int) -> dict[str, Any]:
    """Return the sizes that every model takes."""
    model = cfg.MODEL
    return dict(img_size=img_size, in_channels=model.IN_CHANNELS, num_classes=model.NUM_CLASSES)
