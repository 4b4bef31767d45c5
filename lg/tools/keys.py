"""`--mode keys`: list config keys with their defaults and meaning."""

from __future__ import annotations

import fnmatch
import inspect
import re
import textwrap

from lg.config import defaults
from lg.errors import ConfigError

_LINE = re.compile(r'\s+"(?P<name>[A-Z0-9_]+)": (?P<value>.*?)(?:\s\s+# (?P<text>.*))?')


def print_keys(*, pattern: str) -> None:
    """Print the keys that a pattern matches, with default and meaning.

    Args:
        pattern: Part of a key or its meaning in any case, or a shell pattern of the key.

    Raises:
        ConfigError: No key matches.
    """
    wanted = pattern.lower()
    found = [
        (key, value, meaning)
        for key, (value, meaning) in describe_keys().items()
        if wanted in key.lower() or wanted in meaning.lower() or fnmatch.fnmatch(key, pattern)
    ]
    if not found:
        raise ConfigError(f"No key matches {pattern!r}: --mode keys lists all of them.")
    for key, value, meaning in found:
        print(f"{key}  (default {value!r})")
        print(textwrap.indent(textwrap.fill(meaning, 92), "    "))


def describe_keys() -> dict[str, tuple[object, str]]:
    """Return (default, meaning) of every key; the meanings are the comments in defaults.py."""
    meanings: dict[str, str] = {}
    section, above = "", []
    for line in inspect.getsource(defaults).splitlines():
        text = line.strip()
        match = _LINE.fullmatch(line)
        if text.startswith("# "):
            above.append(text[2:])
        elif match and match["value"] == "{":
            section, above = f"{match['name']}.", []
        elif match:
            meanings[section + match["name"]] = " ".join([*above, match["text"] or ""]).strip()
            above = []
        else:
            above = []
            section = "" if line == "    }," else section
    return {
        key: (value, meanings.get(key) or meanings.get(key.partition(".")[0], ""))
        for key, value in defaults.DEFAULT_VALUES.items()
    }
