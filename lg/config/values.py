"""Values of config keys: parsing, conversion to the type of a key, and how messages show them."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import reprlib
from typing import Any

import yaml

from lg.config.defaults import DEFAULT_VALUES, PATHS
from lg.config.rules import accepted_types
from lg.errors import ConfigError

# A line break in a text would start a line of its own in the script of a cluster job, and an escape
# sequence would control the terminal. Only the free text DESC may have line breaks.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROL_IN_DESC = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NULL = ("null", "Null", "NULL", "None", "~")


def parse(text: str) -> Any:
    """Return the value of a Python or YAML literal, or the text itself if it is neither."""
    for read in (ast.literal_eval, yaml.safe_load):
        with contextlib.suppress(Exception):  # both raise many types
            return read(text)
    return text


def parse_text(text: str) -> str | None:
    """Return None for null, the content of a quoted string, or the text itself."""
    if text in _NULL:
        return None
    with contextlib.suppress(Exception):
        value = ast.literal_eval(text)
        return value if isinstance(value, str) else text
    return text


def coerce(key: str, value: Any, where: str) -> Any:
    """Return the value in the type of its key; make only conversions that lose nothing."""
    single, elements = accepted_types(key)
    default = DEFAULT_VALUES[key]
    if isinstance(value, str) and (elements or str not in single):
        value = parse(value)  # also in files: YAML reads 5e-4, without a point, as text
    if isinstance(value, tuple):
        value = list(value)
    if default is None and value in ("", None):
        return None
    if isinstance(value, list):
        complete = bool(value) or default is not None  # lists of one value per stage are not empty
        fits = bool(elements) and complete and all(_is_one_of(v, elements) for v in value)
    else:
        fits = _is_one_of(value, single)
    if not fits:
        raise ConfigError(
            f"{key} is {shown(value)} ({type(value).__name__}), set {where}; it takes "
            f"{_described(single, elements, nullable=default is None)}."
        )
    pattern = _CONTROL_IN_DESC if key == "DESC" else _CONTROL
    for text in items(value):
        if isinstance(text, str) and pattern.search(text):
            raise ConfigError(
                f"{key} is {shown(value)}, set {where}; it takes text without control characters, "
                "such as line breaks."
            )
    if key in PATHS and isinstance(value, str):
        return os.path.expanduser(value)
    return float(value) if isinstance(default, float) else value


def items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_one_of(value: Any, types: tuple[type, ...]) -> bool:
    """Test for exact types (True is no int); an int serves as a float."""
    return type(value) in types or (type(value) is int and float in types)


# Type -> what one value of it, and several, are called.
_TYPES = {
    bool: ("True or False", "True or False"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
}


def _described(single: tuple[type, ...], elements: tuple[type, ...], *, nullable: bool) -> str:
    forms = ["null"] * nullable + [_TYPES[t][0] for t in single]
    return " or ".join(forms + [f"a list of {_TYPES[t][1]}" for t in elements])


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlist = _REPR.maxdict = 12
_REPR.maxlevel = 3


def shown(value: Any) -> str:
    """Return a value for a message, cut to a readable length."""
    text = _REPR.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
