"""Read config files: plain YAML, with the files named by `_BASE_` resolved."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

import yaml

from lg.config.defaults import DEFAULTS
from lg.errors import ConfigError
from lg.paths import find_config, is_url, local_path

BASE_KEY = "_BASE_"


class _Loader(yaml.SafeLoader):
    """Safe YAML (no Python objects) that rejects a key given twice in one mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked here because construct_mapping also sees keys that come from a merge (<<).
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is given twice, remove one",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return node


def read_with_bases(path: str, chain: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, tree) of a config and its bases, in order of rising priority.

    Args:
        path: A YAML file or the URL of one. A relative `_BASE_` is looked for beside its file and
            then, if it starts with configs/, among the configs of the project.
        chain: The files whose `_BASE_` led here, outermost first.

    Raises:
        ConfigError: A file cannot be read or is no config, or `_BASE_` is circular.
    """
    identity = path if is_url(path) else os.path.realpath(os.path.expanduser(path))
    if identity in chain:
        names = " -> ".join((*chain[chain.index(identity) :], identity))
        raise ConfigError(
            f"{BASE_KEY} is circular: {names}. Remove one of these {BASE_KEY} entries."
        )
    tree = _read(path, chain)
    bases = tree.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"{BASE_KEY} is {bases!r}, set in {path}; it takes a path or a list of paths."
        )
    for base in bases:
        if is_url(path) or is_url(base):
            base = urljoin(path, base)
        else:
            beside = os.path.join(os.path.dirname(path), os.path.expanduser(base))
            base = find_config(beside, name=base)
        yield from read_with_bases(base, (*chain, identity))
    yield path, tree


def _read(path: str, chain: tuple[str, ...]) -> dict[str, Any]:
    """Return the mapping in one file."""
    via = f" (named by {BASE_KEY} in {chain[-1]})" if chain else ""
    if not path.endswith((".yaml", ".yml")):
        raise ConfigError(f"{path}{via} is not a config: use a YAML file ending in .yaml or .yml.")
    try:
        with open(local_path(path, cache=DEFAULTS["DOWNLOAD_CACHE"]), encoding="utf-8") as stream:
            tree = yaml.load(stream, _Loader)
    except OSError as error:
        raise ConfigError(
            f"Cannot read the config {path}{via}: {error.strerror or error}. {_similar(path)}"
        ) from None
    except Exception as error:  # PyYAML also lets ValueError and others through, as for a month 13
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}{via} is not plain YAML: {reason}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(
            f"{path}{via} holds a {type(tree).__name__}; a config is a mapping of sections."
        )
    return tree or {}


def _similar(path: str) -> str:
    """Return the configs in the same folder with similar names, as advice."""
    folder, name = os.path.split(path)
    try:
        names = [
            each
            for each in os.listdir(find_config(folder) or ".")
            if each.endswith((".yaml", ".yml"))
        ]
    except OSError:
        names = []
    near = [os.path.join(folder, each) for each in difflib.get_close_matches(name, names, 3, 0.8)]
    return f"Did you mean {' or '.join(near)}?" if near else "Check the path."
