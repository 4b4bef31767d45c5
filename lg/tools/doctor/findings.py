"""What `--mode doctor` says: plain facts become findings, and findings become lines."""

from __future__ import annotations

import contextlib
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lg.datasets.scan import ImageFacts, format_classes
from lg.errors import is_out_of_memory

PROBLEM, NOTE, FACT = "problem", "note", "fact"
DATA, MODEL, DEVICE, COST, OUTPUT = (
    "Data",
    "Model and guide",
    "Device and precision",
    "Time and memory",
    "Output",
)
TOPICS = (DATA, MODEL, DEVICE, COST, OUTPUT)

_SHOWN = 10  # images or classes that are named; of the others, how many there are
_SHOWN_PUBLISHED = 3  # where nobody is to mend them
_SMALL, _LARGE, _OBLONG = 16, 50_000_000, 10  # pixels a side; pixels; times the shorter side
_TOLD_TRAITS = {
    "palette": "with a palette, read as RGB",
    "gray": "in gray, read as RGB of three equal channels",
    "16-bit": "with 16 bits a channel, of which 8 are used",
    "CMYK": "in CMYK, as for print, converted to RGB without a colour profile",
    "transparent": "with an alpha channel or a transparent colour, laid over white",
    "animated": "of several frames, of which the first is used",
    "turned": "with an EXIF orientation, set upright by it",
}


@dataclass(frozen=True)
class Finding:
    """One thing to know before training.

    Attributes:
        level: PROBLEM: stops training or spoils its result. NOTE: may be as it should be. FACT.
        topic: One of TOPICS.
        text: Says what, where and the way out; lines after the first are examples.
    """

    level: str
    topic: str
    text: str


class Record:
    """The findings so far."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(self, level: str, topic: str, text: str) -> None:
        """Notes a finding, once."""
        self.extend([Finding(level, topic, text)])

    def extend(self, findings: Sequence[Finding]) -> None:
        """Notes findings, each once."""
        self.findings += [each for each in findings if each not in self.findings]

    @contextlib.contextmanager
    def noting(self, topic: str, what: str, *, key: str = "") -> Iterator[None]:
        """Whatever is raised within becomes a problem; `what` says what is done there, `key` which
        setting it is about."""
        try:
            yield
        except Exception as error:
            text = _told(error, what)
            self.add(PROBLEM, topic, text if key in text else f"{key}: {text}")

    def num_problems(self) -> int:
        """How many there are."""
        return sum(each.level == PROBLEM for each in self.findings)


def _told(error: Exception, what: str) -> str:
    """An error for people: what it says itself, if it was written for them."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    if is_out_of_memory(error):
        return (
            f"memory runs out while {what} ({line}). Set TRAIN.MIXED_PRECISION True or a larger "
            "TRAIN.ACCUM_STEPS, which keep the recipe, or lower TRAIN.BATCH_SIZE."
        )
    if isinstance(error, (ValueError, OSError)):
        return str(error).strip()
    return f"{what} fails ({type(error).__name__}: {line}); --mode train would fail likewise."


@dataclass(frozen=True)
class Split:
    """The images of one split, as far as findings need them; n counts them.

    Attributes:
        role: `training` or `test`.
        name: Such as image_folder/train.
        class_names: K names.
        labels: [n], as the set lists them.
        places: n paths, or places in the set's file.
        images: n facts.
        is_own: The user's own images, which can be mended, rather than a published set.
        of_files: Each image is a file of its own.
    """

    role: str
    name: str
    class_names: Sequence[str]
    labels: np.ndarray
    places: Sequence[str]
    images: Sequence[ImageFacts]
    is_own: bool = False
    of_files: bool = True

    def readable(self) -> np.ndarray:
        """[n], True where an image can be read."""
        return np.array([not image.fault for image in self.images], dtype=bool)

    def counts(self, chosen: np.ndarray | None = None) -> np.ndarray:
        """[K], images of each class, all or the chosen ones."""
        labels = self.labels if chosen is None else self.labels[chosen]
        return np.bincount(labels, minlength=len(self.class_names))


def size_of(split: Split) -> Finding:
    """How many images of which sizes there are."""
    counts = split.counts()
    sizes = [(image.width, image.height) for image in split.images if not image.fault]
    plural = "" if len(counts) == 1 else "es"
    text = f"{split.name}: {_count(split.images, split)} in {len(counts)} class{plural}"
    if counts.min() == counts.max():
        text += f" of {counts.max():,}"
    else:
        text += f" of {counts.min():,} to {counts.max():,}"
    if sizes:
        low, high = (f"{w} x {h}" for w, h in (min(sizes, key=_area), max(sizes, key=_area)))
        text += f", {low} pixels" if low == high else f", {low} to {high} pixels"
    return Finding(FACT, DATA, text)


def unreadable(split: Split, *, skip: bool) -> list[Finding]:
    """Images that cannot be read; `skip`: they are left out rather than end the run."""
    faults = [image.fault for image in split.images if image.fault]
    if not faults:
        return []
    text = f"{len(faults):,} of the {len(split.images):,} {split.role} images"
    if skip:
        text = f"DATA_LOADER.ON_ERROR skip leaves out {text}, which cannot be read:"
    else:
        text += (
            " cannot be read; the first that is met ends the run. Mend or remove them, or set "
            "DATA_LOADER.ON_ERROR skip to leave them out:"
        )
    level = NOTE if skip else PROBLEM
    found = [Finding(level, DATA, _with_examples(text, faults))]
    lost = (split.counts() > 0) & (split.counts(split.readable()) == 0)
    if lost.any():
        names = format_classes([split.class_names[k] for k in np.flatnonzero(lost).tolist()])
        text = f"no {split.role} image of {names} can be read: mend some, or remove the class."
        found.append(Finding(PROBLEM, DATA, text))
    return found


def classes(train: Split, test: Split) -> list[Finding]:
    """Classes that are in one split alone; empty folders are told where folders are listed."""
    found = []
    in_train, in_test = train.counts() > 0, test.counts() > 0
    unlearned = np.flatnonzero(in_test & ~in_train)
    if len(unlearned):
        names = format_classes([train.class_names[k] for k in unlearned.tolist()])
        count = int(test.counts()[unlearned].sum())
        text = (
            f"{names} of {train.name} has no training image, but {count:,} in {test.name}, which "
            "no model can get right: add training images, or take the class out of both."
        )
        found.append(Finding(PROBLEM, DATA, text))
    absent = np.flatnonzero(~in_test & ~in_train)
    if len(absent) and not train.is_own:
        names = format_classes([train.class_names[k] for k in absent.tolist()])
        found.append(Finding(NOTE, DATA, f"{names} of {train.name} has no images at all."))
    untested = np.flatnonzero(in_train & ~in_test)
    if len(untested):
        names = format_classes([train.class_names[k] for k in untested.tolist()])
        text = f"{names} has training images but no test image: the test error says nothing of it."
        found.append(Finding(NOTE, DATA, text))
    return found


def copies_within(split: Split) -> list[Finding]:
    """Images of a split that are alike, pixel for pixel."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for position, image in enumerate(split.images):
        if not image.fault:
            groups[image.digest].append(position)
    same: list[str] = []
    other: list[str] = []
    for first, *rest in groups.values():
        for position in rest:
            pair = f"{split.places[first]} and {split.places[position]}"
            if split.labels[first] == split.labels[position]:
                same.append(pair)
            else:
                kinds = (split.class_names[split.labels[i]] for i in (first, position))
                other.append("{} ({!r} and {!r})".format(pair, *kinds))
    found, most = [], _SHOWN if split.is_own else _SHOWN_PUBLISHED
    if other:
        text = (
            f"{_count(other, split)} with a copy in another class, pixel for pixel, so that one "
            f"label is wrong{_remedy(split, 'Remove or relabel')}"
        )
        level = PROBLEM if split.is_own else NOTE
        found.append(Finding(level, DATA, _with_examples(text, other, most)))
    if same:
        text = (
            f"{_count(same, split)} with a copy in the same class, pixel for pixel, which makes it "
            f"count more than others{_remedy(split, 'Remove copies if that is not meant')}"
        )
        found.append(Finding(NOTE, DATA, _with_examples(text, same, most)))
    return found


def copies_across(train: Split, test: Split) -> list[Finding]:
    """Test images that are trained on."""
    first_at: dict[bytes, int] = {}
    for position, image in enumerate(train.images):
        if not image.fault:
            first_at.setdefault(image.digest, position)
    pairs = [
        f"{test.places[position]} and {train.places[first_at[image.digest]]}"
        for position, image in enumerate(test.images)
        if not image.fault and image.digest in first_at
    ]
    if not pairs:
        return []
    text = (
        f"{len(pairs):,} of the {len(test.images):,} test images can be found, pixel for pixel, "
        f"among the training images as well, so the test error is too good"
        f"{_remedy(test, 'Remove them from one of the two')}"
    )
    level = PROBLEM if test.is_own else NOTE
    return [
        Finding(
            level, DATA, _with_examples(text, pairs, _SHOWN if test.is_own else _SHOWN_PUBLISHED)
        )
    ]


def oddities(split: Split) -> list[Finding]:
    """What is unusual about images that can be read; sets kept in one file have nothing of it."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for position, image in enumerate(split.images):
        if image.fault or not split.of_files:
            continue
        short, long = sorted((image.width, image.height))
        told = [_TOLD_TRAITS[trait] for trait in image.traits]
        if short < _SMALL:
            told.append(f"less than {_SMALL} pixels wide or high")
        if short * long > _LARGE:
            told.append(f"of more than {_LARGE // 10**6} megapixels, slow to read: shrink them")
        if long > _OBLONG * short:
            told.append(f"over {_OBLONG} times as long as wide, squeezed or cut to a square")
        for each in told:
            kinds[each].append(position)
    found = []
    for told_once, positions in kinds.items():
        first = split.images[positions[0]]
        every = "all " if len(positions) == len(split.images) > 1 else ""
        where = "" if len(positions) == 1 else "the first is "
        text = (
            f"{every}{_count(positions, split)} {told_once} ({where}{split.places[positions[0]]}, "
            f"{first.width} x {first.height})"
        )
        found.append(Finding(NOTE, DATA, text))
    return found


def report(findings: Sequence[Finding], *, width: int = 0) -> list[str]:
    """Findings as lines, by topic, problems first; `width` 0: that of the terminal, 100 at most."""
    width = width or min(100, shutil.get_terminal_size((100, 24)).columns)
    lines = []
    for topic in TOPICS:
        mine = [each for each in findings if each.topic == topic]
        if mine:
            lines.append(topic)
        for level in (FACT, PROBLEM, NOTE):
            for each in mine:
                if each.level == level:
                    lines += _lines_of(each, width)
    counts = {k: sum(each.level == k for each in findings) for k in (PROBLEM, NOTE)}
    problems, notes = (f"{n} {k}{'' if n == 1 else 's'}" for k, n in counts.items())
    if counts[PROBLEM]:
        lines.append(f"{problems} to mend before training, {notes}.")
    else:
        lines.append(f"No problem, {notes}: ready to train.")
    return lines


def _lines_of(finding: Finding, width: int) -> list[str]:
    mark = {PROBLEM: "PROBLEM", NOTE: "note", FACT: ""}[finding.level]
    first, *examples = finding.text.split("\n")
    # Paths are never broken, so that they can be copied.
    wrap = textwrap.TextWrapper(
        width=width,
        initial_indent=f"  {mark:<7}  ",
        subsequent_indent=" " * 11,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [*wrap.wrap(first), *(f"{'':13}{each}" for each in examples)]


def _with_examples(text: str, examples: Sequence[str], most: int = _SHOWN) -> str:
    more = len(examples) - most
    lines = [text, *examples[:most], *([f"and {more:,} more"] if more > 0 else [])]
    return "\n".join(lines)


def _count(some: Sequence[object], split: Split) -> str:
    return f"{len(some):,} {split.role} image{'' if len(some) == 1 else 's'}"


def _remedy(split: Split, text: str) -> str:
    """What to do about copies; a published set stays as it is, or results cannot be compared."""
    return f". {text}:" if split.is_own else "; so it is in this published set:"


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
