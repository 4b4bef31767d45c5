"""What every image set is, and how a part of one is drawn.

n counts the images of a set, K its classes.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar

import numpy as np
from PIL import Image

from lg.errors import DataError

_NUM_PRINTS = 16  # images that stand for a set in its fingerprint


# Faults of a set without which the rest of it can still be used; see `tolerating`.
MISSING, EMPTY_CLASS, UNTRAINED_CLASS = "missing", "empty class", "untrained class"
_tolerated: ContextVar[dict[str, list[str]] | None] = ContextVar("tolerated", default=None)


@contextlib.contextmanager
def tolerating(*kinds: str) -> Iterator[dict[str, list[str]]]:
    """Within, faults of these kinds leave out what they concern in place of ending it all.

    Args:
        *kinds: MISSING: listed images that are not there stay listed. EMPTY_CLASS: a class without
            images. UNTRAINED_CLASS: a class of the held-out split alone, whose images are left out.

    Returns:
        Their messages, by kind.
    """
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    token = _tolerated.set({**(_tolerated.get() or {}), **found})
    try:
        yield found
    finally:
        _tolerated.reset(token)


def found_fault(kind: str, text: str) -> None:
    """Notes a fault that is tolerated.

    Raises:
        DataError: it is not.
    """
    tolerated = _tolerated.get()
    if tolerated is None or kind not in tolerated:
        raise DataError(text)
    tolerated[kind].append(text)


class ImageDataset(ABC):
    """A labelled set of images in a fixed order, without transforms and without tensors.

    Constructing one reads labels and file lists and decodes no image file. Instances are plain
    data, so that they travel to worker processes, spawned ones included.

    Attributes:
        name: the name of the set, as `build_dataset` takes it.
        split: the part of the set, under the set's own name for it ("train", "val" or "test").
        class_names: K names, in the order of the labels.
        labels: [n] int64, each in 0..K-1.
        indices: [n] int64, where each image is in the full set: 0..n-1 but for a subset.
    """

    def __init__(
        self, name: str, split: str, class_names: Sequence[str], labels: Sequence[int] | np.ndarray
    ) -> None:
        """Keep the description of the set.

        Raises:
            DataError: there is no image, or a label is no whole number in 0..K-1.
        """
        self.name = name
        self.split = split
        self.class_names = list(class_names)
        self.labels = check_labels(labels, len(self.class_names), f"{name}, split {split!r}")
        self.indices: np.ndarray = np.arange(len(self.labels), dtype=np.int64)

    @property
    def num_classes(self) -> int:
        """K, counting classes of which this split may hold no image."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The image at `index`, in mode RGB and upright, in its stored size.

        Raises:
            DataError: its file cannot be read.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name the sample for a message: the path of its file, or its place in the set's file."""


class DatasetSubset(ImageDataset):
    """Some images of a set; classes, their order and the labels stay those of the full set.

    Attributes:
        full: the set the images come from, never itself a subset.
        indices: [n] int64, ascending, where each image is in `full`.
    """

    def __init__(self, dataset: ImageDataset, indices: np.ndarray) -> None:
        """Select `indices` (whole numbers in 0..len(dataset)-1) of `dataset`."""
        chosen = np.sort(np.asarray(indices, dtype=np.int64))
        super().__init__(dataset.name, dataset.split, dataset.class_names, dataset.labels[chosen])
        # One level only: indices then mean the same to whoever stores things by sample.
        self.full: ImageDataset = dataset.full if isinstance(dataset, DatasetSubset) else dataset
        self.indices = dataset.indices[chosen]

    def image(self, index: int) -> Image.Image:
        return self.full.image(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.full.describe(int(self.indices[index]))


def stratified_subset(dataset: ImageDataset, fraction: float, seed: int) -> ImageDataset:
    """Keep round(fraction * n) images, each class in proportion to its size, in original order.

    The same seed gives the same images on every machine, and a smaller fraction keeps a subset of
    what a larger one keeps. Every class keeps at least one image if there is room for that.

    Args:
        dataset: the set to draw from.
        fraction: share of the images to keep, in (0, 1]; 1 returns `dataset` itself.
        seed: 0..2^32-1.

    Raises:
        DataError: fraction or seed is out of its range, or no image would be left.
    """
    if not 0 < fraction <= 1:
        raise DataError(
            f"fraction of {dataset.name} is {fraction!r}: give a number above 0 and at most 1"
        )
    if not 0 <= seed < 2**32:
        raise DataError(f"seed of the subset is {seed!r}: give a whole number in 0..2^32-1")
    if fraction == 1:
        return dataset
    num_kept = round(fraction * len(dataset))
    if num_kept == 0:
        raise DataError(
            f"fraction {fraction!r} of the {len(dataset)} images of {dataset.name} keeps none: "
            f"give at least {1 / len(dataset):.2g}"
        )
    return DatasetSubset(dataset, stratified_order(dataset.labels, seed)[:num_kept])


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """An order of the samples of which every beginning is stratified.

    The k-th drawn sample (k = 0, 1, ...) of a class of m samples stands at (k + 1/2) / m, which is
    Webster's apportionment: proportional, and unlike the largest-remainder rule it never takes a
    sample back when the total grows (the Alabama paradox), so beginnings are nested. The two rules
    agree but for ties and rare cases of very unequal classes. First, each class has one sample,
    the largest class before the others.

    Args:
        labels: [n] int64.
        seed: 0..2^32-1.

    Returns:
        [n] int64, a permutation of 0..n-1.

    Source: Balinski and Young, Fair Representation (1982), on house monotonicity.
    """
    # NumPy promises RandomState's stream for ever; that of default_rng may change.
    random = np.random.RandomState(seed).random_sample(len(labels))
    _, groups, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    by_class = np.lexsort((random, groups))
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - starts[groups[by_class]]
    position = (rank + 0.5) / sizes[groups]
    # Ties (classes of equal size) break by the draw, so that no class is always served first.
    return np.lexsort((random, position, rank > 0))


def fingerprint(dataset: ImageDataset) -> str:
    """SHA-256 of what a whole set holds and in which order: its labels, and a few of its images.

    Of a subset, that of the full set. An image that cannot be read counts as such: whether that is
    a fault is for others to say.
    """
    full = dataset.full if isinstance(dataset, DatasetSubset) else dataset
    digest = hashlib.sha256(full.labels.astype("<i8").tobytes())
    for index in np.linspace(0, len(full) - 1, _NUM_PRINTS).astype(int):
        try:
            image = full.image(int(index))
        except DataError:
            digest.update(b"unreadable")
        else:
            digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def check_labels(labels: Sequence[int] | np.ndarray, num_classes: int, where: str) -> np.ndarray:
    """Labels as [n] int64, once they are seen to be whole numbers in 0..num_classes-1.

    Raises:
        DataError: they are not, or there are none; the message starts with `where`.
    """
    try:
        array = np.asarray(labels)
    except ValueError as error:  # lists of unequal lengths
        raise DataError(f"{where}: labels are no list of numbers; fetch the data again") from error
    if array.size == 0:
        raise DataError(f"{where}: it holds no images; unpack the data again")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{where}: labels are {array.dtype} of shape {array.shape}, but must be one whole "
            "number per image; fetch the data again"
        )
    wrong = np.flatnonzero((array < 0) | (array >= num_classes))
    if wrong.size:
        raise DataError(
            f"{where}: the label of image {wrong[0]} is {array[wrong[0]]}, but the {num_classes} "
            f"classes are numbered 0..{num_classes - 1}; labels and class names do not belong "
            "together, fetch the data again"
        )
    return array.astype(np.int64)


def resolve_split(name: str, split: str, allowed: Mapping[str, str]) -> str:
    """The set's own name for `split`.

    Args:
        name: of the set, for the message.
        split: what was asked for.
        allowed: every accepted name -> the set's own.

    Raises:
        DataError: `split` is not accepted.
    """
    if split not in allowed:
        raise DataError(f"split of {name} is {split!r}: give one of {', '.join(allowed)}")
    return allowed[split]
