"""The transformer families by name, built from the settings that a config gives them.

Settings carry the names of the config's keys; each family's function takes them in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lg.config.rules import FAMILIES
from lg.errors import ConfigError
from lg.models.backbone import Backbone

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
    if family.stages:
        num_stages = len(_stage_list(kind, transformer, "HIDDEN_DIM"))
        for name in family.stages:
            arguments[name.lower()] = _per_stage(kind, transformer, name, num_stages)
        for name, value in own.items():
            if isinstance(value, list):
                _check_length(f"{family.section}.{name}", value, num_stages)
    arguments |= {name.lower(): value for name, value in own.items()}
    _check_mlp(arguments["hidden_dim"], arguments["mlp_ratio"])
    build = getattr(import_module(f"lg.models.{family.function}"), family.function)
    return build(**arguments)


def with_keys(message: str, keys: Mapping[str, str]) -> str:
    """Return the message of a model's error with config keys in place of the argument names."""
    names = "|".join(map(re.escape, keys))
    return re.sub(rf"\b({names})\b", lambda match: keys[match[0]], message)


def keys_of(*sections: tuple[str, Settings]) -> dict[str, str]:
    """Return argument name -> key for the settings of some sections; the last section wins."""
    return {name.lower(): f"{section}.{name}" for section, names in sections for name in names}


def _check_mlp(hidden_dim: Any, mlp_ratio: Any) -> None:
    """Reject ratios that leave no channel."""
    widths = hidden_dim if isinstance(hidden_dim, list) else [hidden_dim]
    ratios = mlp_ratio if isinstance(mlp_ratio, list) else [mlp_ratio] * len(widths)
    for width, ratio in zip(widths, ratios, strict=True):
        if int(width * ratio) < 1:
            raise ConfigError(
                f"TRANSFORMER.MLP_RATIO {ratio} of TRANSFORMER.HIDDEN_DIM {width} leaves the MLP "
                "no channel: raise it"
            )


def single(kind: str, transformer: Settings, name: str) -> Any:
    """Return TRANSFORMER.<name> of a model that takes one number.

    Raises:
        ConfigError: It is a list, or not set.
    """
    value = transformer[name]
    if value is None:
        value = _UNSET.get(name)
    if isinstance(value, list) or (value is None and (kind, name) not in _OPTIONAL):
        raise ConfigError(f"TRANSFORMER.{name} is {value!r}; MODEL.TYPE {kind} takes one number.")
    return value


def _stage_list(kind: str, transformer: Settings, name: str) -> list[Any]:
    """Return TRANSFORMER.<name> of a model that takes one number per stage."""
    value = transformer[name]
    if not isinstance(value, list) or not value:
        raise ConfigError(
            f"TRANSFORMER.{name} is {value!r}; MODEL.TYPE {kind} takes a list, one entry per stage."
        )
    return value


def _per_stage(kind: str, transformer: Settings, name: str, num_stages: int) -> list[Any]:
    """Return TRANSFORMER.<name> for each stage; a single number applies to every stage."""
    value = transformer[name]
    if value is None:
        value = _UNSET.get(name)
    if isinstance(value, (int, float)):
        return [value] * num_stages
    values = _stage_list(kind, transformer, name)
    _check_length(f"TRANSFORMER.{name}", values, num_stages)
    return values


def _check_length(key: str, values: list[Any], num_stages: int) -> None:
    if len(values) != num_stages:
        raise ConfigError(
            f"{key} is {values}, but TRANSFORMER.HIDDEN_DIM has {num_stages} stages: give one "
            "entry per stage"
        )
