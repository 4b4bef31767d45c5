"""Load, validate and dump configs.

`load_config` is the only way to get a config. It returns a frozen `CfgNode` in which every value
has the right type, lies in its range and can take effect. Everything else raises a `ConfigError`
that names the key, its value, what is allowed and the fix.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from lg.config.combinations import faults
from lg.config.defaults import (
    DEFAULT_VALUES,
    DEFAULTS,
    FREE_ON_RESUME,
    REPORTED_ON_RESUME,
    flatten,
)
from lg.config.rules import CHOICES, RANGES, accepted_types
from lg.config.values import coerce, items, parse, parse_text, shown
from lg.config.yaml_files import read_with_bases
from lg.errors import ConfigError
from lg.paths import find_config, find_data

_COMMAND_LINE = "on the command line"
_SWITCHES = {kind: f"DISTILLATION.ENABLE_{kind}" for kind in ("INTER", "LOGIT")}
_KNOWN = {**DEFAULTS, **DEFAULT_VALUES}  # sections and keys


def load_config(path: str | os.PathLike[str], opts: Sequence[Any] = ()) -> CfgNode:
    """Load a YAML config with its `_BASE_` files and overrides, validate it and freeze it.

    Args:
        path: A .yaml file or the URL of one. Its `_BASE_` is a path or a list of paths, relative to
            the file. Later bases override earlier ones, and the file overrides its bases. Both may
            name a config of this project, configs/..., in any working directory.
        opts: Flat list KEY VALUE KEY VALUE ..., as on the command line. Strings are parsed, other
            values are taken as they are.

    Raises:
        ConfigError: Unreadable file, unknown key, wrong type, value out of range, or a combination
            that cannot take effect.
    """
    path = find_config(os.fsdecode(path))
    cfg = _assemble(read_with_bases(path), opts)
    if cfg.OUT_DIR is None:
        cfg.OUT_DIR = os.path.join("work_dirs", Path(path).stem)
    cfg.freeze()
    return cfg


def load_trained_config(weights: str | os.PathLike[str], opts: Sequence[Any] = ()) -> CfgNode:
    """Load the config that a checkpoint of this project was trained with.

    Args:
        weights: The checkpoint, a file or URL.
        opts: As for `load_config`.

    Raises:
        CheckpointError: The file cannot be read.
        ConfigError: It holds no config, or the config cannot be used.
    """
    from lg.checkpoint import read_checkpoint  # imports torch

    given = dict(_parse_overrides(opts))
    cache = os.path.expanduser(given.get("DOWNLOAD_CACHE") or DEFAULT_VALUES["DOWNLOAD_CACHE"])
    text = read_checkpoint(weights, cache=cache).get("cfg")
    try:
        tree = yaml.safe_load(text) if isinstance(text, str) else None
    except Exception:  # PyYAML raises many types
        tree = None
    if not isinstance(tree, dict):
        raise ConfigError(f"{weights} holds no config: pass the one it was trained with as --cfg.")
    cfg = _assemble([(os.fspath(weights), tree)], opts)
    cfg.DOWNLOAD_CACHE = cache  # not that of the machine that trained them
    cfg.freeze()
    return cfg


def stored_config(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config in a checkpoint, dotted key -> value; empty if it holds none."""
    try:
        return dict(flatten(yaml.safe_load(state["cfg"])))
    except Exception:  # PyYAML raises many types
        return {}


def _assemble(files: Iterable[tuple[str, Mapping[str, Any]]], opts: Sequence[Any]) -> CfgNode:
    """Return the validated config of files in order of rising priority, and overrides."""
    given: dict[str, tuple[Any, str]] = {}  # key -> its value and where it is set
    for file, tree in files:
        where = f"in {file}"
        given |= {key: (value, where) for key, value in _known_values(tree, where)}
    given |= {key: (value, _COMMAND_LINE) for key, value in _parse_overrides(opts)}
    given = _without_guidance(given)
    cfg = CfgNode(DEFAULTS)  # a deep copy
    for key, (value, where) in given.items():
        _set(cfg, key, coerce(key, value, where))
    _validate(cfg, {key: where for key, (_, where) in given.items()})
    if DEFAULT_VALUES["DATA_LOADER.ROOT"] == cfg.DATA_LOADER.ROOT:
        cfg.DATA_LOADER.ROOT = find_data(cfg.DATA_LOADER.ROOT)
    return cfg


def with_values(cfg: CfgNode, values: Mapping[str, Any]) -> CfgNode:
    """Return a frozen copy of a config with other values, dotted key -> value, unchecked."""
    cfg = cfg.clone()
    cfg.defrost()
    for key, value in values.items():
        _set(cfg, key, value)
    cfg.freeze()
    return cfg


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    (cfg[section] if section else cfg)[name] = value


def _without_guidance(given: dict[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    """Drop the guidance that a file sets up, if another file or the command line switches it off.

    The rest is the config of the plain model, so one file serves both.
    """
    off = [given[key] for key in _SWITCHES.values() if key in given]
    if not off or any(parse(str(value)) is not False for value, _ in off):
        return given
    sections = ["DISTILLATION."]
    if given.get("MODEL.TYPE", (DEFAULT_VALUES["MODEL.TYPE"], ""))[0] != "ResNet":
        sections += ["CNN.", "RESNET."]
    places = {where for _, where in off}
    return {
        key: (value, where)
        for key, (value, where) in given.items()
        if key in _SWITCHES.values()
        or where in places
        or where == _COMMAND_LINE
        or not key.startswith(tuple(sections))
    }


def dump_config(cfg: CfgNode) -> str:
    """Return the whole config as YAML text that `load_config` reads back to the same values."""
    return cfg.dump(sort_keys=False, default_flow_style=None, width=100)


def changed_keys(old_text: str, new_text: str) -> tuple[list[str], list[str]]:
    """Return "KEY: old -> new" for each key whose change affects a resumed run, in order.

    Returns:
        (changes that are only reported, changes that make it another run). A key that one of the
        texts lacks, as those of other versions do, is reported. If the old text, which may come
        from a foreign file, is no config, one line reports that.
    """
    old, new = (stored_config({"cfg": text}) for text in (old_text, new_text))
    if not old:
        return ["the old config cannot be read"], []
    keys = dict.fromkeys([*new, *old])
    reported: list[str] = []
    refused: list[str] = []
    for key in keys:
        if old.get(key) != new.get(key) and not key.startswith(FREE_ON_RESUME):
            is_harmless = key.startswith(REPORTED_ON_RESUME) or not (key in old and key in new)
            group = reported if is_harmless else refused
            group.append(f"{key}: {old.get(key)} -> {new.get(key)}")
    return reported, refused


def _known_values(
    tree: Mapping[Any, Any], where: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a file's tree; reject keys that have no default."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        default = _default(key, where)
        if "." in str(name):
            raise ConfigError(
                f"{key} {where} is the form for the command line; in a file, nest its sections."
            )
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            yield from _known_values(value, where, f"{key}.")
        else:
            _reject_section(key, value, where)
            yield key, value


def _parse_overrides(opts: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of KEY VALUE KEY VALUE ..."""
    joined = next((str(key) for key in opts[::2] if "=" in str(key)), None)
    if joined is not None:
        pair = joined.replace("=", " ", 1)
        raise ConfigError(f"Overrides are pairs KEY VALUE: write {pair} instead of {joined}.")
    if len(opts) % 2:
        raise ConfigError(
            f"Overrides are pairs KEY VALUE; the last one, {shown(opts[-1])}, has no value."
        )
    for key, value in zip(map(str, opts[::2]), opts[1::2], strict=True):
        _reject_section(key, value, _COMMAND_LINE)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, str) and str in accepted_types(key)[0]:
            value = parse_text(value)
        yield key, value


def _default(key: str, where: str) -> Any:
    """Return the default of a key; a mapping for a section."""
    if key not in _KNOWN:
        raise ConfigError(f"Unknown config key {shown(key)} {where}.{_nearest(key)}")
    return _KNOWN[key]


def _reject_section(key: str, value: Any, where: str) -> None:
    default = _default(key, where)
    if isinstance(default, Mapping):
        raise ConfigError(
            f"{key} is {shown(value)}, set {where}; it is a section: set its keys, such as "
            f"{key}.{next(iter(default))}."
        )


# Other names of settings, and what they are called here.
_ALIASES = {
    "LR": "OPTIM.BASE_LR",
    "LEARNING_RATE": "OPTIM.BASE_LR",
    "EPOCHS": "OPTIM.MAX_EPOCH",
    "NUM_EPOCHS": "OPTIM.MAX_EPOCH",
    "SEED": "RNG_SEED",
    "OUTPUT_DIR": "OUT_DIR",
    "WORKERS": "DATA_LOADER.NUM_WORKERS",
    "DATA_DIR": "DATA_LOADER.ROOT",
}


def _nearest(key: str) -> str:
    """Return a hint at similar keys, and at keys of the same name in other sections."""
    wanted = key.upper()
    alias = _ALIASES.get(wanted.rpartition(".")[2])
    if alias is not None:
        return f" Did you mean {alias}?"
    near = difflib.get_close_matches(wanted, _KNOWN, 3, 0.6)
    near += [k for k in _KNOWN if k.rpartition(".")[2] == wanted.rpartition(".")[2]]
    return f" Nearest known keys: {', '.join(dict.fromkeys(near))}." if near else ""


def _validate(cfg: CfgNode, where: Mapping[str, str]) -> None:
    """Raise for the first choice, range or combination that does not hold.

    Args:
        cfg: The config.
        where: Key -> where it is set, such as "in FILE"; keys that keep their defaults are absent.
    """
    values = dict(flatten(cfg))

    def fault(key: str, advice: str) -> ConfigError:
        place = f", set {where[key]}" if key in where else ""
        return ConfigError(f"{key} is {shown(values[key])}{place}; {advice}")

    for key, choices in CHOICES.items():
        for value in items(values[key]):
            is_timm = "timm/NAME" in choices and value.startswith("timm/") and len(value) > 5
            if value not in choices and not is_timm:
                near = {"gpu": ["cuda"]}.get(value) or difflib.get_close_matches(
                    value, choices, 1, 0.5
                )
                if "timm/NAME" in choices and "_" in value and not near:
                    near = [f"timm/{value}"]
                hint = f" Did you mean {near[0]}?" if near else ""
                raise fault(key, f"allowed: {', '.join(c or repr(c) for c in choices)}.{hint}")
    for key, (test, allowed) in RANGES.items():
        for value in items(values[key]):
            if value is not None and not test(value):
                raise fault(key, f"it must be {allowed}.")
    for key, advice in faults(cfg):
        raise fault(key, advice)
    # A file may set guidance up for a command that switches it off, but not forget to switch it on.
    if not any(values[switch] or switch in where for switch in _SWITCHES.values()):
        for key in where:
            if key.startswith("DISTILLATION.") and values[key] != DEFAULT_VALUES[key]:
                raise fault(
                    key, "it has no effect: set DISTILLATION.ENABLE_INTER or ENABLE_LOGIT True."
                )
    for kind, switch in _SWITCHES.items():
        if values[switch] or where.get(switch) == _COMMAND_LINE:  # on, or off on purpose
            continue
        for key, place in where.items():
            is_meant = place == _COMMAND_LINE or switch not in where
            is_set = key.startswith(f"DISTILLATION.{kind}_") and values[key] != DEFAULT_VALUES[key]
            if is_set and is_meant:
                raise fault(key, f"it has no effect: set {switch} True.")
