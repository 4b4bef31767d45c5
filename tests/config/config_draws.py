"""What generated configs are drawn from: values that each key takes or refuses, and the ways to
give them. Read from the tables in `lg.config.rules`; no rule is repeated here."""

from __future__ import annotations

import ast
import contextlib
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hypothesis import strategies as st

import lg
from lg.config import dump_config, flatten
from lg.config.defaults import DEFAULTS
from lg.config.rules import CHOICES, NULLABLE, RANGES, TYPED_LISTS

CONFIGS = Path(__file__).parents[2] / "configs"
LEAVES = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "_base_")
BASES = st.just(None) | st.sampled_from(LEAVES)
KEYS = dict(flatten(DEFAULTS))
SECTIONS = [name for name, value in DEFAULTS.items() if isinstance(value, Mapping)]
ANY_KEY = st.sampled_from(sorted(KEYS))

INTEGERS = [0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 64, 1000, 2**31, 2**53 + 1, 2**63 - 1]
INTEGERS += [-1, -7, -(2**62), 2**63, -(2**63), 10**30, -(10**30), 10**300]
FLOATS = [0.0, -0.0, 0.1, 0.3, 0.5, 0.99, 1.0, 1.1, 2.5, 4.0, 1e-9, 1e-300, 5e-324, 1e9, 1e300]
FLOATS += [-0.1, -1.0, -1e300, math.nan, math.inf, -math.inf]
FREE = ("two\nlines", "\ud800")  # what free text may hold, and other text not
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800]")
WORDS = ["", "a", "x y", "train.yaml", "héé漢😀", "\u202etxt", "../../x", "a" * 250, *FREE, "\0"]
WORDS += ["$HOME", "%s{}", "!!python/name:os.system", "- [", "timm/", "timm/no_such_model"]
WORDS += ["timm/two\nlines", "\x1b[31mred", "a\x85b"]
OTHERS: list[Any] = [None, True, False, {}, {"a": 1}, {"SPLIT": {"a": []}}]
LISTS = [[], [[1, 2], [3]], [None], [True, 1], ["x", 3], [[[[[[[1]]]]]]], [1, "x y"]]
SINGLE = [*INTEGERS, *FLOATS, *WORDS, *OTHERS]
POOL = [*SINGLE, *LISTS, [math.nan], [-1, 2**63], [10**30]]

# What a refusal says, by what is wrong.
TYPE, RANGE, CHOICE = "; it takes ", "; it must be ", "; allowed: "


def element_types(key: str) -> tuple[type, ...]:
    """The types of a key's value, or of the elements of its list."""
    if key in TYPED_LISTS:
        return (TYPED_LISTS[key],)
    own = NULLABLE.get(key, (type(KEYS[key]),))
    types = tuple(t for t in own if t is not list)
    return (*types, int) if float in types else types


def takes_lists(key: str) -> bool:
    return key in TYPED_LISTS or list in NULLABLE.get(key, ())


def wrong_with(key: str, value: Any) -> str | None:
    """What is wrong with one value, or one element of a list; None if the key takes it."""
    if type(value) not in element_types(key) or (type(value) is int and abs(value) >= 2**63):
        return TYPE
    if isinstance(value, str) and not (key == "DESC" and value in FREE) and UNSEEN.search(value):
        return TYPE
    if key in CHOICES and value not in CHOICES[key]:
        named = "timm/NAME" in CHOICES[key] and value.startswith("timm/") and len(value) > 5
        return None if named and value.isprintable() else CHOICE
    return RANGE if key in RANGES and not RANGES[key][0](value) else None


@cache
def good_elements(key: str) -> list[Any]:
    chosen = [c for c in CHOICES.get(key, ()) if c != "timm/NAME"]
    return chosen + [v for v in SINGLE if v not in chosen and wrong_with(key, v) is None]


@cache
def good_values(key: str) -> st.SearchStrategy[Any]:
    """Values that a key takes as far as it alone decides."""
    one = st.sampled_from(good_elements(key))
    many = st.lists(one, min_size=int(key in NULLABLE), max_size=4)
    choices = [] if key in TYPED_LISTS else [one]
    choices += [many] * takes_lists(key) + [st.none()] * (key in NULLABLE)
    return st.one_of(choices)


@cache
def bad_values(key: str) -> list[tuple[str, Any]]:
    """(what is wrong, value) of values that a key must refuse whatever the others are."""
    faults = [(wrong_with(key, v), v) for v in SINGLE]
    good = good_elements(key)[:1]
    found: list[tuple[str, Any]] = []
    for fault, value in faults:
        if takes_lists(key) and fault:
            found.append((fault, [*good, value, *good]))
        if key in TYPED_LISTS:
            found.append((TYPE, value))
        elif fault and not (key in NULLABLE and value in (None, "")):
            found.append((fault, value))
    if not takes_lists(key):
        found += [(TYPE, value) for value in LISTS]
    elif key in NULLABLE:
        found.append((TYPE, []))
    return found


class Given(NamedTuple):
    """A config as a user gives it: a leaf of configs/ (None: the defaults), some keys in a file on
    top of it, and some on the command line."""

    base: Path | None
    in_file: dict[str, Any]
    opts: list[Any]

    def write(self, folder: Path) -> Path:
        tree: dict[str, Any] = {"_BASE_": [str(self.base)]} if self.base else {}
        for key, value in self.in_file.items():
            *sections, name = key.split(".")
            inner = tree.setdefault(sections[0], {}) if sections else tree
            inner[name] = value
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        return path


def as_typed(key: str, value: Any) -> Any:
    """A value as it is typed behind its key; itself where that would be read as another."""
    takes_text = key in KEYS and element_types(key) == (str,) and key not in TYPED_LISTS
    if not isinstance(value, str) and not takes_text:
        with contextlib.suppress(ValueError, RecursionError):
            if ast.literal_eval(repr(value)) == value:
                return repr(value)
    return value


@st.composite
def givens(draw: st.DrawFn, values: Mapping[str, Any], base: Path | None) -> Given:
    """These values on top of a leaf, each in the file, typed or handed over by Python."""
    in_file: dict[str, Any] = {}
    opts: list[Any] = []
    for key, value in values.items():
        way = draw(st.sampled_from(["file", "file", "typed", "python"]))
        if way == "file":
            in_file[key] = value
        else:
            opts += [key, as_typed(key, value) if way == "typed" else value]
    return Given(base, in_file, opts)


@st.composite
def with_one_bad_value(draw: st.DrawFn) -> tuple[Given, str, str]:
    """A leaf with some keys changed to what they take and one to what it refuses; that one; and
    what is wrong with it."""
    kind = draw(st.sampled_from([TYPE, RANGE, CHOICE]))
    key = draw(st.sampled_from([k for k in sorted(KEYS) if kind in dict(bad_values(k))]))
    others = draw(st.lists(ANY_KEY, max_size=3, unique=True))
    values = {other: draw(good_values(other)) for other in others if other != key}
    values[key] = draw(st.sampled_from([v for fault, v in bad_values(key) if fault == kind]))
    return draw(givens(values, draw(BASES))), key, kind


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[str, str, Path | None, bool]:
    """A key; the same with a letter left out, doubled, changed, swapped, or all in lower case; a
    leaf to write it in; and whether it is typed instead."""
    key = draw(ANY_KEY)
    at = draw(st.integers(key.rfind(".") + 1, len(key) - 1))
    head, letter, tail = key[:at], key[at], key[at + 1 :]
    swapped = head + tail[:1] + letter + tail[1:]
    forms = [head + tail, key[: at + 1] + key[at:], head + "Q" + tail, swapped, key.lower()]
    wrong = draw(st.sampled_from([f for f in forms if f not in KEYS]))
    return key, wrong, draw(BASES), draw(st.booleans())


ANYTHING = st.one_of(
    st.sampled_from(POOL),
    st.recursive(
        st.sampled_from(SINGLE),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=5,
    ),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)


@st.composite
def absurd(draw: st.DrawFn) -> Given:
    """Any values at all for keys, sections, and names that do not exist."""
    values = {}
    for key in draw(st.lists(ANY_KEY, min_size=1, max_size=3, unique=True)):
        values[key] = draw(good_values(key) if draw(st.integers(0, 4)) else ANYTHING)
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from([*SECTIONS, "", "X", "TRAIN.X", "DESC.A", "_base_", "é"]))
        values = {k: v for k, v in values.items() if not k.startswith(f"{name}.")}
        values[name] = draw(ANYTHING)
    return draw(givens(values, draw(BASES)))


@cache
def resolved(path: Path) -> str:
    return dump_config(lg.load_config(path))


@st.composite
def broken_text(draw: st.DrawFn) -> str:
    """The text of a config, short or resolved, with pieces cut out, doubled or put in."""
    base = draw(st.sampled_from(LEAVES))
    text = resolved(base) if draw(st.booleans()) else base.read_text(encoding="utf-8")
    text = re.sub(r"(?<=[\[ ])[\w./-]+\.yaml", lambda found: str(base.parent / found[0]), text)
    signs = [*"[]{}:,-?&*!|>'\"%@`#\t\n\0\ufeff\x85", "<<: ", "!!python/tuple ", "\n- "]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        end = draw(st.integers(at, min(at + 20, len(text))))
        put = draw(st.sampled_from([*signs, text[at:end]]) | st.text(max_size=4))
        text = text[:at] + put + text[draw(st.sampled_from([at, end])) :]
    return text


# --- Small models ------------------------------------------------------------------------------

PLAIN = {"PATCH_SIZE": 4, "HIDDEN_DIM": 24, "DEPTH": 3, "NUM_HEADS": 2, "MLP_RATIO": 2}
STAGED = {"HIDDEN_DIM": [8, 16], "DEPTH": [2, 1], "NUM_HEADS": [1, 2], "MLP_RATIO": [2, 2.5]}
OVERLAPPING = {**STAGED, "PATCH_SIZE": [5, 3], "PATCH_STRIDE": [4, 2]}
CVT = {"WITH_CLS_TOKEN": [False, True], "QKV_PROJ_METHOD": ["dw_bn", "avg"]}
CVT |= {key: value[:2] for key, value in DEFAULTS["CVT"].items() if key not in CVT}
# A small model of each family, at 16 pixels.
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "DeiT": {"TRANSFORMER": PLAIN},
    "T2TViT": {"TRANSFORMER": {**PLAIN, "PATCH_SIZE": None}, "T2T": {"TOKEN_DIM": 8}},
    "PiT": {"TRANSFORMER": {**STAGED, "PATCH_SIZE": 4, "MLP_RATIO": 2}, "PIT": {"STRIDE": 2}},
    "PVT": {"TRANSFORMER": {**STAGED, "PATCH_SIZE": [4, 2]}, "PVT": {"SR_RATIO": [2, 1]}},
    "PVTv2": {"TRANSFORMER": OVERLAPPING, "PVT": {"SR_RATIO": [2, 1]}},
    "ConViT": {"TRANSFORMER": PLAIN, "CONVIT": {"LOCAL_LAYERS": 2}},
    "CvT": {"TRANSFORMER": {**OVERLAPPING, "PATCH_PADDING": 1}, "CVT": CVT},
    "ResNet": {"CNN": {"DEPTH": 8}},
    **{f"timm/test_{name}": {} for name in ("resnet", "vit3", "efficientnet", "maxvit")},
}
# Keys that say how large a model is: what they are changed to is small.
SIZES = re.compile("TRANSFORMER|T2T|PIT|PVT|CONVIT|CVT|CNN.DEPTH|RESNET|IMG_SIZE|CHANNELS|CLASSES")
FEW = (0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 0.1, 0.5, 0.99, 2.5, 1e-300, 1e-9)


@cache
def small_values(key: str) -> st.SearchStrategy[Any]:
    """What a key takes, small where it says how large the model is."""
    if not SIZES.search(key) or key in CHOICES:
        return good_values(key)
    one = st.sampled_from([v for v in good_elements(key) if v in FEW])
    many = st.lists(one, min_size=1, max_size=3)
    return one if not takes_lists(key) else many if key in TYPED_LISTS else one | many


@st.composite
def small_models(draw: st.DrawFn) -> Given:
    """A small model of any family, often guided, with up to four keys changed to what they take."""
    kind = draw(st.sampled_from(sorted(TINY)))
    tree = {"MODEL": {"TYPE": kind, "IMG_SIZE": 16, "NUM_CLASSES": 10}, **TINY[kind]}
    tree |= {"TRAIN": {"DATASET": "digits", "BATCH_SIZE": 8}}
    if draw(st.booleans()):
        count = draw(st.integers(1, 2))
        guide: dict[str, Any] = {"ENABLE_INTER": True, "TEACHER_IMG_SIZE": 16}
        for side in ("STUDENT", "TEACHER"):
            guide[f"INTER_{side}_INDEX"] = draw(st.permutations([0, 1, 2]))[:count]
        tree |= {"CNN": {"DEPTH": 8}, "DISTILLATION": guide}
    values = dict(flatten(tree))
    near = st.sampled_from([key for key in sorted(KEYS) if key.partition(".")[0] in tree])
    for key in draw(st.lists(near | ANY_KEY, max_size=4, unique=True)):
        if key != "MODEL.TYPE":
            values[key] = draw(small_values(key))
    return draw(givens(values, None))
