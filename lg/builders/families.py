"""The transformer families by name, built from the settings that a config gives them.

Settings carry the names of the config's keys; each family's function takes the same in lower case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lg.models.backbone import Backbone
from lg.models.convit import convit
from lg.models.cvt import cvt
from lg.models.deit import deit
from lg.models.pit import pit
from lg.models.pvt import pvt
from lg.models.pvtv2 import pvtv2
from lg.models.t2t import t2t

Settings = Mapping[str, Any]


class Family(NamedTuple):
    """How a family of models is built from the config.

    Attributes:
        build: The family's function in `lg.models`.
        one: Keys of TRANSFORMER that hold one value.
        stages: Keys of TRANSFORMER that hold one value per stage. A single value counts for all
            stages, except for HIDDEN_DIM, whose length is the number of stages.
        section: The family's own config section, if it has one.
    """

    build: Callable[..., Backbone]
    one: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    section: str | None = None


_RATES = ("DROP_RATE", "DROP_PATH_RATE", "ATTENTION_DROP_RATE")
_SHAPE = ("HIDDEN_DIM", "DEPTH", "NUM_HEADS", "MLP_RATIO")
_PLAIN = ("PATCH_SIZE", *_SHAPE, *_RATES)
FAMILIES: dict[str, Family] = {
    "DeiT": Family(deit, one=_PLAIN),
    "T2TViT": Family(t2t, one=_PLAIN, section="T2T"),
    "PiT": Family(
        pit,
        one=("PATCH_SIZE", "MLP_RATIO", *_RATES),
        stages=("HIDDEN_DIM", "DEPTH", "NUM_HEADS"),
        section="PIT",
    ),
    "PVT": Family(pvt, one=_RATES, stages=("PATCH_SIZE", *_SHAPE), section="PVT"),
    "PVTv2": Family(
        pvtv2, one=_RATES, stages=("PATCH_SIZE", "PATCH_STRIDE", *_SHAPE), section="PVT"
    ),
    "ConViT": Family(convit, one=_PLAIN, section="CONVIT"),
    "CvT": Family(
        cvt,
        stages=("PATCH_SIZE", "PATCH_STRIDE", "PATCH_PADDING", *_SHAPE, *_RATES),
        section="CVT",
    ),
}
# What an unset rate means.
_UNSET = {"DROP_RATE": 0.0, "DROP_PATH_RATE": 0.0, "ATTENTION_DROP_RATE": 0.0}
# Keys that a family can do without: T2T.STRIDE says how large a token's patch is.
_OPTIONAL = {("T2TViT", "PATCH_SIZE")}


def build_family(kind: str, transformer: Settings, own: Settings, **sizes: Any) -> Backbone:
    """Return a model of the family `kind`.

    Args:
        kind: A name in `FAMILIES`, as in MODEL.TYPE.
        transformer: The settings of the section TRANSFORMER.
        own: Those of the family's own section, empty where it has none.
        **sizes: Image size, channels, classes, and what else the family's function takes.

    Raises:
        ValueError: A setting is missing, a list where a number belongs, or of the wrong length; or
            the sizes do not fit together. The message names the config's keys.
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
            if isinstance(value, list) and len(value) != num_stages:
                raise ValueError(_length_error(f"{family.section}.{name}", value, num_stages))
    arguments |= {name.lower(): value for name, value in own.items()}
    _check_mlp(arguments["hidden_dim"], arguments["mlp_ratio"])
    return family.build(**arguments)


def _check_mlp(hidden_dim: Any, mlp_ratio: Any) -> None:
    """Refuse ratios of which nothing is left."""
    widths = hidden_dim if isinstance(hidden_dim, list) else [hidden_dim]
    ratios = mlp_ratio if isinstance(mlp_ratio, list) else [mlp_ratio] * len(widths)
    for width, ratio in zip(widths, ratios, strict=True):
        if int(width * ratio) < 1:
            raise ValueError(
                f"TRANSFORMER.MLP_RATIO {ratio} of TRANSFORMER.HIDDEN_DIM {width} leaves the MLP "
                "no channel: raise it"
            )


def single(kind: str, transformer: Settings, name: str) -> Any:
    """Return TRANSFORMER.<name> of a model that takes one number.

    Raises:
        ValueError: It is a list, or not set.
    """
    value = transformer[name]
    if value is None:
        value = _UNSET.get(name)
    if isinstance(value, list) or (value is None and (kind, name) not in _OPTIONAL):
        raise ValueError(f"TRANSFORMER.{name} is {value!r}; MODEL.TYPE {kind} takes one number.")
    return value


def _stage_list(kind: str, transformer: Settings, name: str) -> list[Any]:
    """Return TRANSFORMER.<name> of a model that takes one number a stage."""
    value = transformer[name]
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"TRANSFORMER.{name} is {value!r}; MODEL.TYPE {kind} takes a list, one entry a stage."
        )
    return value


def _per_stage(kind: str, transformer: Settings, name: str, num_stages: int) -> list[Any]:
    """Return TRANSFORMER.<name> for each stage; one number stands for all of them."""
    value = transformer[name]
    if value is None:
        value = _UNSET.get(name)
    if isinstance(value, (int, float)):
        return [value] * num_stages
    values = _stage_list(kind, transformer, name)
    if len(values) != num_stages:
        raise ValueError(_length_error(f"TRANSFORMER.{name}", values, num_stages))
    return values


def _length_error(key: str, values: list[Any], num_stages: int) -> str:
    return (
        f"{key} is {values}, but TRANSFORMER.HIDDEN_DIM has {num_stages} stages: give one entry a "
        "stage"
    )
