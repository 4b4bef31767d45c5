"""Findings about the images of a training: unreadable, copied, odd, or of classes without others.

n counts the images of a split, K its classes.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lg.datasets.scan import ImageFacts
from lg.files.atomic import write_text
from lg.tools.doctor.findings import DATA, FACT, NOTE, PROBLEM, Finding, with_examples

_SMALL, _LARGE, _OBLONG = 16, 50_000_000, 10  # pixels per side; pixels; ratio of the sides
_NAMED = 5  # classes
IMBALANCE = 2  # images of the largest class over those of the smallest, from which it is noted
LEAK_COLUMNS = ("image", "label", "copy", "copy_split", "copy_label")


@dataclass(frozen=True)
class Split:
    """The images of one split.

    Attributes:
        role: `training`, `validation` or `test`.
        name: Such as image_folder/train.
        class_names: K names.
        labels: [n].
        places: n paths, or positions in the set's file.
        names: n paths relative to DATA_LOADER.ROOT, or positions in the set's file.
        images: n facts.
        is_own: The user's own images, which can be fixed, rather than a published set.
    """

    role: str
    name: str
    class_names: Sequence[str]
    labels: np.ndarray
    places: Sequence[str]
    images: Sequence[ImageFacts]
    is_own: bool = False
    names: Sequence[str] = ()

    @property
    def readable(self) -> list[int]:
        """Positions of the images that can be read."""
        return [position for position, image in enumerate(self.images) if not image.fault]

    def class_of(self, position: int) -> str:
        """Return the name of an image's class."""
        return self.class_names[int(self.labels[position])]

    def counts(self, positions: Sequence[int] | None = None) -> np.ndarray:
        """Count the images of each class, [K]; all of them, or those at the given positions."""
        labels = self.labels if positions is None else self.labels[list(positions)]
        return np.bincount(labels, minlength=len(self.class_names))

    def classes(self, chosen: np.ndarray) -> str:
        """Name the chosen classes, [K] bool, as the subject of a sentence; the verb is singular."""
        names = [self.class_names[k] for k in np.flatnonzero(chosen).tolist()]
        shown = ", ".join(repr(name) for name in names[:_NAMED])
        more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        return f"{'class' if len(names) == 1 else 'each of the classes'} {shown}{more}"

    def report(self, level: str, text: str, examples: Sequence[str], fix: str) -> Finding:
        """Return a finding with examples; only a note for a published set."""
        if self.is_own:
            return Finding(level, DATA, with_examples(f"{text}. {fix}:", examples))
        text = f"{text}; this published set is kept as it is:"
        return Finding(NOTE, DATA, with_examples(text, examples))


def summarize(split: Split) -> Finding:
    """Report how many images of which sizes a split has."""
    counts = split.counts()
    low, high = f"{counts.min():,}", f"{counts.max():,}"
    text = (
        f"{split.name}: {_count(split.images, split)} in {len(counts)} "
        f"class{'' if len(counts) == 1 else 'es'} of {low if low == high else f'{low} to {high}'}"
    )
    sizes = [(split.images[i].width, split.images[i].height) for i in split.readable]
    if sizes:
        sizes.sort(key=lambda size: size[0] * size[1])
        low, high = (f"{width} x {height}" for width, height in (sizes[0], sizes[-1]))
        text += f", {low if low == high else f'{low} to {high}'} pixels"
    return Finding(FACT, DATA, text)


def find_unreadable(split: Split, *, skip: bool) -> list[Finding]:
    """Find images that cannot be read; `skip` is whether training skips them."""
    faults = [image.fault for image in split.images if image.fault]
    if not faults:
        return []
    text = f"{len(faults):,} of the {len(split.images):,} {split.role} images cannot be read"
    if skip:
        text += " and are skipped (DATA_LOADER.ON_ERROR skip):"
    else:
        text += (
            "; the first one stops the run. Repair or remove them, or set DATA_LOADER.ON_ERROR "
            "skip to leave them out:"
        )
    found = [Finding(NOTE if skip else PROBLEM, DATA, with_examples(text, faults))]
    lost = (split.counts() > 0) & (split.counts(split.readable) == 0)
    if lost.any():
        text = f"no {split.role} image of {split.classes(lost)} can be read: repair some, or remove"
        found.append(Finding(PROBLEM, DATA, f"{text} the class."))
    return found


def find_class_gaps(train: Split, test: Split) -> list[Finding]:
    """Find classes without training or tested images; empty folders are found by listing them."""
    found = []
    in_train, in_test = train.counts() > 0, test.counts() > 0
    if (untrained := in_test & ~in_train).any():
        text = (
            f"{train.classes(untrained)} of {train.name} has no training images, but "
            f"{int(test.counts()[untrained].sum()):,} in {test.name}, which no model can get right:"
            " add training images, or remove the class from both."
        )
        found.append(Finding(PROBLEM, DATA, text))
    if (absent := ~in_test & ~in_train).any() and not train.is_own:
        text = f"{train.classes(absent)} of {train.name} has no images."
        found.append(Finding(NOTE, DATA, text))
    if (untested := in_train & ~in_test).any():
        text = f"{train.classes(untested)} has training images but no {test.role} images, so the"
        found.append(Finding(NOTE, DATA, f"{text} {test.role} error does not cover it."))
    return found


def find_copies(split: Split) -> list[Finding]:
    """Find images of a split that are identical pixel for pixel, in one class or in two."""
    first_at = _first_positions(split)
    same, other = [], []
    for position in split.readable:
        first = first_at[split.images[position].digest]
        pair = f"{split.places[first]} and {split.places[position]}"
        if split.labels[first] != split.labels[position]:
            names = (split.class_names[split.labels[i]] for i in (first, position))
            other.append("{} ({!r} and {!r})".format(pair, *names))
        elif first != position:
            same.append(pair)
    found = []
    if other:
        text = f"{_count(other, split)} identical to an image of another class, so one label is"
        found.append(split.report(PROBLEM, f"{text} wrong", other, "Remove or relabel them"))
    if same:
        text = f"{_count(same, split)} identical to another image of its class, which then"
        fix = "Remove the copies unless they are intended"
        found.append(split.report(NOTE, f"{text} counts more than once", same, fix))
    return found


def find_leaks(train: Split, test: Split) -> list[Finding]:
    """Find tested images that are identical to training images, pixel for pixel.

    Args:
        train: Training images, or those that were held out of them.
        test: Tested images.
    """
    first_at = _first_positions(train)
    pairs = [
        f"{test.places[position]} and {train.places[first_at[test.images[position].digest]]}"
        for position in test.readable
        if test.images[position].digest in first_at
    ]
    if not pairs:
        return []
    text = f"{len(pairs):,} of the {len(test.images):,} {test.role} images are identical to"
    text += f" {train.role} images, so the {test.role} error is too low"
    fix = (
        "Remove them from one of the two, or write the list with --copies FILE and train with "
        "TRAIN.EXCLUDE FILE"
    )
    return [test.report(PROBLEM, text, pairs, fix)]


def list_leaks(train: Split, test: Split) -> list[list[str]]:
    """Return rows of LEAK_COLUMNS: each image of either split that the other one has too.

    Of several copies in the other split, the row names the first.
    """
    trained, tested = _first_positions(train), _first_positions(test)
    by_train = ((i, tested.get(train.images[i].digest)) for i in train.readable)
    by_test = ((trained.get(test.images[j].digest), j) for j in test.readable)
    found = (*by_train, *by_test)
    pairs = sorted({(i, j) for i, j in found if i is not None and j is not None})
    return [
        [train.names[i], train.class_of(i), test.names[j], test.role, test.class_of(j)]
        for i, j in pairs
    ]


def write_leaks(path: str, rows: Sequence[Sequence[str]]) -> str:
    """Write rows of LEAK_COLUMNS as a CSV file, unless there are none; return what was done."""
    if not rows:
        return f"No copies were found; {path} was not written."
    text = io.StringIO()
    csv.writer(text).writerows([LEAK_COLUMNS, *rows])
    write_text(path, text.getvalue())
    count = len({row[0] for row in rows})
    return f"{path}: {count:,} training images with copies; leave them out with TRAIN.EXCLUDE."


def find_imbalance(train: Split, *, balance: str) -> list[Finding]:
    """Find classes of very unequal sizes that nothing balances.

    Args:
        train: The training images.
        balance: TRAIN.BALANCE.
    """
    counts = train.counts()
    present = np.flatnonzero(counts)
    if balance != "none" or not len(present):
        return []
    low, high = (int(pick(counts[present])) for pick in (np.min, np.max))
    if high < IMBALANCE * low:
        return []
    small, large = (train.class_names[counts.tolist().index(size)] for size in (low, high))
    text = (
        f"class {large!r} has {high / low:.1f} times as many training images as class {small!r} "
        f"({high:,} and {low:,}): a model may neglect small classes. Set TRAIN.BALANCE weights or "
        "sampling, and compare balanced accuracy."
    )
    return [Finding(NOTE, DATA, text)]


def find_oddities(split: Split) -> list[Finding]:
    """Find unusual image files that can be read."""
    positions_of: dict[str, list[int]] = defaultdict(list)
    for position in split.readable:
        image = split.images[position]
        if not image.mode:  # not a file
            continue
        short, long = sorted((image.width, image.height))
        oddities = []
        if image.mode not in image.natural_modes:
            target = image.natural_modes[0].replace("L", "gray")
            oddities.append(f"in color mode {image.mode}, converted to {target}")
        if short < _SMALL:
            oddities.append(f"less than {_SMALL} pixels wide or high")
        if short * long > _LARGE:
            oddities.append(f"of more than {_LARGE // 10**6} megapixels, slow to read: shrink them")
        if long > _OBLONG * short:
            oddities.append(f"over {_OBLONG} times as long as wide, squeezed or cut to a square")
        for oddity in oddities:
            positions_of[oddity].append(position)
    found = []
    for oddity, positions in positions_of.items():
        image, place = split.images[positions[0]], split.places[positions[0]]
        every = "all " if len(positions) == len(split.images) > 1 else ""
        first = "" if len(positions) == 1 else "the first is "
        text = (
            f"{every}{_count(positions, split)} {oddity} ({first}{place}, {image.width} x "
            f"{image.height})"
        )
        found.append(Finding(NOTE, DATA, text))
    return found


def _first_positions(split: Split) -> dict[bytes, int]:
    """Return the first position of each content."""
    return {split.images[position].digest: position for position in reversed(split.readable)}


def _count(some: Sequence[object], split: Split) -> str:
    return f"{len(some):,} {split.role} image{'' if len(some) == 1 else 's'}"
