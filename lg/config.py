"""The config tree: every key with its default, loading (with `_BASE_`), validation and dumping.

`load_config` is the only way to get a config. It returns a frozen `CfgNode` in which every value
has the right type, lies in its range and can take effect; anything else is a `ConfigError` that
names the key, its value, what is allowed and the fix.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

import yaml
from yacs.config import CfgNode

from lg.config_defaults import DEFAULTS
from lg.config_rules import CHOICES, COMBINATIONS, NULLABLE, RANGES, TYPED_LISTS
from lg.paths import is_url, local_path

BASE_KEY = "_BASE_"


class ConfigError(ValueError):
    """A config that cannot be used: names the key, its value, what is allowed and the fix."""


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
        opts: flat list KEY VALUE KEY VALUE ..., as on the command line.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, value out of range, impossible
            combination.
    """
    settings: dict[str, Setting] = {}
    for source, tree in _read_with_bases(os.fspath(path), ()):
        _collect(tree, source, settings)
    if len(opts) % 2:
        raise ConfigError(
            f"Overrides come in pairs KEY VALUE; the last one, {opts[-1]!r}, has no value."
        )
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        default = _known(key, "the command line")
        if isinstance(default, Mapping):
            raise ConfigError(
                f"{key} on the command line is a section; give one of its keys, such as "
                f"{key}.{next(iter(default))}."
            )
        settings[key] = Setting(_parse(text), "the command line")
    cfg = CfgNode(_plain_copy(DEFAULTS))
    for key, setting in settings.items():
        _assign(cfg, key, _coerce(key, setting))
    if cfg.OUT_DIR is None:
        cfg.OUT_DIR = os.path.join("work_dirs", Path(os.fspath(path)).stem)
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
    """How two dumped configs differ: "KEY: old -> new" for each key, in order."""
    old, new = (dict(flatten(yaml.safe_load(text))) for text in (old_text, new_text))
    keys = dict.fromkeys([*new, *old])
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in keys if old.get(k) != new.get(k)]


class _Loader(yaml.SafeLoader):
    """Safe YAML (no Python objects) in which a key given twice is an error rather than silently the
    last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise ConfigError(
                    f"{self.name}, line {key_node.start_mark.line + 1}: the key "
                    f"{key_node.value!r} is given "
                    "twice; remove one."
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_with_bases(path: str, chain: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file, tree) in the order of rising priority: bases first, depth first, then the file
    itself."""
    identity = path if is_url(path) else os.path.realpath(path)
    if identity in chain:
        names = " -> ".join(_short(p) for p in (*chain[chain.index(identity) :], identity))
        raise ConfigError(
            f"{BASE_KEY} goes in a circle: {names}. Remove one of these {BASE_KEY} entries."
        )
    tree = _read_yaml(path, chain)
    bases = tree.pop(BASE_KEY, [])
    if not isinstance(bases, (str, list)) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(
            f"{_short(path)}: {BASE_KEY} is {bases!r}; it takes a path or a list of paths."
        )
    for base in [bases] if isinstance(bases, str) else bases:
        where = urljoin(path, base) if is_url(path) else os.path.join(os.path.dirname(path), base)
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
            loader = _Loader(stream)
            try:
                tree = loader.get_single_data()
            finally:
                loader.dispose()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"Cannot read the config {path}{via}: {reason}. Check the path."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path}{via} is not plain YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(tree, dict | None):
        raise ConfigError(
            f"{path}{via}: a config is a mapping of sections, this file holds a "
            f"{type(tree).__name__}."
        )
    return tree or {}


def _collect(
    tree: Mapping[str, Any], source: str, settings: dict[str, Setting], prefix: str = ""
) -> None:
    """Flattens one file's tree into `settings`, refusing keys that the tree of defaults does not
    have."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        default = _known(key, source)
        if isinstance(default, Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{_short(source)}: {key} is a section with keys of its own, not {value!r}."
                )
            _collect(value, source, settings, f"{key}.")
        else:
            settings[key] = Setting(value, source)


def _known(key: str, source: str) -> Any:
    """The default under a dotted key (a Mapping for a section)."""
    node: Any = DEFAULTS
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            leaves = [k for k, _ in flatten(DEFAULTS)]
            last = {leaf.rsplit(".", 1)[-1]: leaf for leaf in leaves}
            near = difflib.get_close_matches(key.upper(), leaves, 3, 0.6)
            near += [
                last[n]
                for n in difflib.get_close_matches(key.upper().rsplit(".", 1)[-1], last, 3, 0.7)
            ]
            hint = f" Nearest known keys: {', '.join(dict.fromkeys(near))}." if near else ""
            raise ConfigError(f"Unknown config key {key} in {_short(source)}.{hint}")
        node = node[part]
    return node


def _parse(text: str) -> Any:
    """A command-line value: a Python or YAML literal where it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (bool, int, float, list, type(None))) else text


def _coerce(key: str, setting: Setting) -> Any:
    """The value in the type of its default; only conversions that lose nothing are made."""
    default, value = _known(key, setting.source), setting.value
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str) and not isinstance(default, str) and key not in NULLABLE:
        value = _parse(value)  # YAML reads 5e-4, without a point, as text
    if key in NULLABLE:
        allowed, wanted = NULLABLE[key], f"null or {' or '.join(t.__name__ for t in NULLABLE[key])}"
        if isinstance(value, str) and str not in allowed:
            value = _parse(value)
        good = value is None or (type(value) in allowed)
    elif isinstance(default, float) and type(value) is int:
        return float(value)
    else:
        good, wanted = type(value) is type(default), type(default).__name__
    if good and key in TYPED_LISTS:
        element = TYPED_LISTS[key]
        good, wanted = all(type(v) is element for v in value), f"a list of {element.__name__}"
    if not good:
        raise ConfigError(
            f"{key} is {value!r} ({type(value).__name__}), set in {_short(setting.source)}; it "
            f"takes {wanted}."
        )
    return value


def _validate(cfg: CfgNode, settings: Mapping[str, Setting]) -> None:
    """Checks choices, ranges and combinations; the first fault found is raised."""
    values = dict(flatten(cfg))

    def fault(key: str, text: str) -> ConfigError:
        where = f", set in {_short(settings[key].source)}" if key in settings else ""
        return ConfigError(f"{key} is {values[key]!r}{where}; {text}")

    for key, choices in CHOICES.items():
        if values[key] not in choices and not (
            "timm/NAME" in choices and str(values[key]).startswith("timm/") and len(values[key]) > 5
        ):
            near = difflib.get_close_matches(str(values[key]), choices, 1, 0.5)
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


def _assign(cfg: CfgNode, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        cfg = cfg[section]
    cfg[name] = value


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
