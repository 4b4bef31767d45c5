"""The config tree: every key with its default, loading (with `_BASE_`), validation and dumping.

`load_config` is the only way to get a config. It returns a frozen `CfgNode` in which every value
has the right type, lies in its range and can take effect; anything else is a `ConfigError` that
names the key, its value, what is allowed and the fix.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

import yaml
from yacs.config import CfgNode

from lg.config.defaults import DEFAULTS, FREE_ON_RESUME
from lg.config.rules import CHOICES, COMBINATIONS, NULLABLE, RANGES, TYPED_LISTS
from lg.errors import ConfigError
from lg.paths import is_url, local_path

BASE_KEY = "_BASE_"
_COMMAND_LINE = "the command line"
# What a terminal obeys, or begins a line of its own in the script of a cluster's job; and halves of
# characters, but for those that stand for bytes of a file name that is no UTF-8.
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]")
_UNFIT_FREE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FREE_TEXT = ("DESC",)
_NULL = ("null", "Null", "NULL", "None", "~")


class Setting(NamedTuple):
    """One value and the place that set it (a file, or "command line")."""

    value: Any
    source: str


def load_config(path: str | os.PathLike[str], opts: Sequence[str] = ()) -> CfgNode:
    """Reads a YAML config with its `_BASE_` files and command-line overrides; validates and freezes
    it.

    Args:
        path: a .yaml file, or a URL of one. `_BASE_` in it is a path or a list of paths, relative
            to the file; later files override earlier ones, the file itself overrides them all.
        opts: flat list KEY VALUE KEY VALUE ..., as on the command line; values that are no text
            are taken as they are.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, value out of range, impossible
            combination.
    """
    path = os.fsdecode(path)
    settings: dict[str, Setting] = {}
    for source, tree in _read_with_bases(path, ()):
        _collect(tree, source, settings)
    _collect_overrides(opts, settings)
    cfg = CfgNode(_plain_copy(DEFAULTS))
    for key, setting in settings.items():
        *sections, name = key.split(".")
        reduce(getitem, sections, cfg)[name] = _coerce(key, setting)
    if cfg.OUT_DIR is None:
        cfg.OUT_DIR = os.path.join("work_dirs", Path(path).stem)
    _validate(cfg, settings)
    cfg.freeze()
    return cfg


def dump_config(cfg: CfgNode) -> str:
    """The whole resolved config as YAML text; `load_config` reads it back to the same values."""
    return yaml.safe_dump(_plain_copy(cfg), sort_keys=False, default_flow_style=None, width=100)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("SECTION.KEY", value) for every leaf of a config tree, in order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changed_keys(old_text: str, new_text: str) -> list[str]:
    """Return "KEY: old -> new" for each key whose change affects a resumed training, in order.

    An old text that is no config, as in a file from elsewhere, gives one line that says so.
    """
    try:
        old = dict(flatten(yaml.safe_load(old_text)))
    except Exception:  # see _read_yaml
        return ["what they were cannot be read"]
    new = dict(flatten(yaml.safe_load(new_text)))
    keys = dict.fromkeys([*new, *old])
    return [
        f"{k}: {old.get(k)} -> {new.get(k)}"
        for k in keys
        if old.get(k) != new.get(k) and not k.startswith(FREE_ON_RESUME)
    ]


class _Loader(yaml.SafeLoader):
    """Safe YAML (no Python objects) in which a key given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, not in construct_mapping, where merge keys (<<) have already repeated others.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    line = key_node.start_mark.line + 1
                    raise ConfigError(
                        f"line {line}: the key {key_node.value!r} is given twice; remove one."
                    )
                seen.add(key_node.value)
        return node


def _read_with_bases(path: str, chain: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file, tree) in the order of rising priority: bases, depth first, then the file."""
    if "\0" in path:
        raise ConfigError(f"{path!r} cannot be the path of a config: it has a NUL character in it.")
    identity = path if is_url(path) else os.path.realpath(os.path.expanduser(path))
    if identity in chain:
        names = " -> ".join(_short(p) for p in (*chain[chain.index(identity) :], identity))
        raise ConfigError(
            f"{BASE_KEY} goes in a circle: {names}. Remove one of these {BASE_KEY} entries."
        )
    tree = _read_yaml(path, chain)
    bases = tree.pop(BASE_KEY, [])
    if not isinstance(bases, (str, list)) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(
            f"{_short(path)}: {BASE_KEY} is {_shown(bases)}; it takes a path or a list of paths."
        )
    for base in [bases] if isinstance(bases, str) else bases:
        if is_url(path):
            where = urljoin(path, base)
        else:
            where = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        yield from _read_with_bases(base if is_url(base) else where, (*chain, identity))
    yield path, tree


def _read_yaml(path: str, chain: tuple[str, ...]) -> dict[str, Any]:
    via = f" (named by {BASE_KEY} in {_short(chain[-1])})" if chain else ""
    if not path.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"{path}{via}: configs are YAML files, named .yaml or .yml; nothing else is read."
        )
    try:
        with open(local_path(path, cache=DEFAULTS["DOWNLOAD_CACHE"]), encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"Cannot read the config {path}{via}: {reason}. Check the path."
        ) from None
    try:
        tree = yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{_short(path)}{via}, {error}") from None
    except Exception as error:  # PyYAML lets a dozen types escape, such as for a date in month 13
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        raise ConfigError(f"{_short(path)}{via} is not plain YAML: {reason}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(
            f"{_short(path)}{via}: a config is a mapping of sections, this file holds a "
            f"{type(tree).__name__}."
        )
    return tree or {}


def _collect(
    tree: Mapping[str, Any], source: str, settings: dict[str, Setting], prefix: str = ""
) -> None:
    """Flattens one file's tree into `settings`, refusing keys that no default has."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        default = _known(key, source)
        if isinstance(default, Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{_short(source)}: {key} is a section with keys of its own, not "
                    f"{_shown(value)}."
                )
            _collect(value, source, settings, f"{key}.")
        elif "." in name:
            raise ConfigError(
                f"{_short(source)}: {name} is the command line's way to say it; nest the sections."
            )
        else:
            settings[key] = Setting(value, source)


def _collect_overrides(opts: Sequence[Any], settings: dict[str, Setting]) -> None:
    """Puts KEY VALUE KEY VALUE ... on top of `settings`."""
    if len(opts) % 2:
        raise ConfigError(
            f"Overrides come in pairs KEY VALUE; the last one, {_shown(opts[-1])}, has no value."
        )
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        default = _known(str(key), _COMMAND_LINE)
        if isinstance(default, Mapping):
            raise ConfigError(
                f"{key} on {_COMMAND_LINE} is a section; give one of its keys, such as "
                f"{key}.{next(iter(default))}."
            )
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, str):
            value = _parse_text(value) if _takes_text(key) else _parse(value)
        settings[key] = Setting(value, _COMMAND_LINE)


def _known(key: str, source: str) -> Any:
    """The default under a dotted key (a Mapping for a section)."""
    node: Any = DEFAULTS
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            lasts = {leaf: leaf.rsplit(".", 1)[-1] for leaf, _ in flatten(DEFAULTS)}
            wanted, known = key.upper(), dict.fromkeys([*lasts, *DEFAULTS])
            near = difflib.get_close_matches(wanted, known, 3, 0.6)
            names = dict.fromkeys(lasts.values())
            for name in difflib.get_close_matches(wanted.rsplit(".", 1)[-1], names, 3, 0.7):
                near += [leaf for leaf, last in lasts.items() if last == name]
            hint = f" Nearest known keys: {', '.join(dict.fromkeys(near))}." if near else ""
            shown = key if key.isprintable() and 0 < len(key) <= 100 else _shown(key)
            raise ConfigError(f"Unknown config key {shown} in {_short(source)}.{hint}")
        node = node[part]
    return node


def _parse(text: str) -> Any:
    """A command-line value: a Python or YAML literal where it is one, else the text itself."""
    # Both readers let many types escape for what is not theirs, TypeError for {[]: 1} among them.
    with contextlib.suppress(Exception):
        return ast.literal_eval(text)
    with contextlib.suppress(Exception):
        value = yaml.safe_load(text)
        if isinstance(value, (bool, int, float, list, type(None))):
            return value
    return text


def _parse_text(text: str) -> str | None:
    """A command-line value of a key that takes text: as it is, or what its quotes hold."""
    if text in _NULL:
        return None
    value = _parse(text)
    return value if isinstance(value, str) else text


def _takes_text(key: str) -> bool:
    return type(_known(key, "")) is str or NULLABLE.get(key) == (str,)


def _coerce(key: str, setting: Setting) -> Any:
    """The value in the type of its default; only conversions that lose nothing are made."""
    value = setting.value
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str) and not _takes_text(key):
        value = _parse(value)  # YAML reads 5e-4, without a point, as text
    if key in NULLABLE and value in ("", None):
        return None
    wanted = _type_fault(key, value)
    if wanted:
        raise ConfigError(
            f"{key} is {_shown(value)} ({type(value).__name__}), set in {_short(setting.source)}; "
            f"it takes {wanted}."
        )
    return float(value) if isinstance(_known(key, ""), float) else value


def _type_fault(key: str, value: Any) -> str | None:
    """What a key takes, if the value is not that."""
    own = type(_known(key, ""))
    types = NULLABLE.get(key, (int, float) if own is float else (own,))
    single = tuple(t for t in types if t is not list)
    elements = (TYPED_LISTS[key],) if key in TYPED_LISTS else single
    many = isinstance(value, list)
    values = value if many else [value]
    emptied = many and not value and key in NULLABLE
    if type(value) not in types or emptied or not all(type(v) in elements for v in values):
        wanted = ["null"] * (key in NULLABLE)
        wanted += ["float"] if own is float else [t.__name__ for t in single]
        if list in types:
            wanted.append(f"a list of {' or '.join(t.__name__ for t in elements)}")
        return " or ".join(wanted)
    if any(type(v) is int and abs(v) >= 2**63 for v in values):
        return "whole numbers below 2^63"
    text = "".join(v for v in values if type(v) is str)
    if (_UNFIT_FREE if key in _FREE_TEXT else _UNFIT).search(text):
        return "text without control characters, such as line breaks, or halves of characters"
    return None


def _validate(cfg: CfgNode, settings: Mapping[str, Setting]) -> None:
    """Checks choices, ranges and combinations; the first fault found is raised."""
    values = dict(flatten(cfg))

    def fault(key: str, text: str) -> ConfigError:
        where = f", set in {_short(settings[key].source)}" if key in settings else ""
        return ConfigError(f"{key} is {_shown(values[key])}{where}; {text}")

    for key, choices in CHOICES.items():
        given = values[key] if isinstance(values[key], list) else [values[key]]
        for one in given:
            named = "timm/NAME" in choices and one.startswith("timm/") and len(one) > 5
            if one in choices or (named and one.isprintable()):
                continue
            near = difflib.get_close_matches(str(one), choices, 1, 0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise fault(
                key, f"allowed: {', '.join(repr(c) if c == '' else c for c in choices)}.{hint}"
            )
    for key, (test, text) in RANGES.items():
        value = values[key]
        for element in value if isinstance(value, list) else [value]:
            if element is not None and not test(element):
                raise fault(key, f"it must be {text}.")
    for key, broken, advice in COMBINATIONS:
        if broken(values):
            raise fault(key, advice(values) if callable(advice) else advice)
    switches = ("DISTILLATION.ENABLE_INTER", "DISTILLATION.ENABLE_LOGIT")
    idle = [
        key
        for key in settings
        if key.startswith("DISTILLATION.") and values[key] != _known(key, "")
    ]
    if idle and not any(values[s] or s in settings for s in switches):
        raise fault(
            idle[0], "it has no effect: set DISTILLATION.ENABLE_INTER or ENABLE_LOGIT True."
        )


def _plain_copy(tree: Any) -> Any:
    """Nested plain dicts and lists, independent of the source."""
    if isinstance(tree, Mapping):
        return {k: _plain_copy(v) for k, v in tree.items()}
    return list(tree) if isinstance(tree, (list, tuple)) else tree


def _short(path: str) -> str:
    """A path relative to the working folder where that is shorter."""
    if is_url(path) or not os.path.isabs(path):
        return path
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) else path


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long: lists that name each other print without end."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python refuses to print numbers of thousands of digits
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 200 else f"{text[:200]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12
_SHORT.maxlevel = 3
