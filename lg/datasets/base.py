"""The interface of data sets, stratified subsets and fingerprints.

n counts the images of a set, K its classes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from lg.datasets.image import PixelFormat
from lg.errors import DataError, first_few

_NUM_FINGERPRINT_IMAGES = 16

# Kinds of faults that leave the rest of a set usable.
MISSING = "missing"  # listed image files do not exist
EMPTY_CLASS = "empty class"  # a class folder without images
UNTRAINED_CLASS = "untrained class"  # a class of the held-out split only; its images are dropped


class Fault(NamedTuple):
    """A fault found while listing a set."""

    kind: str  # MISSING, EMPTY_CLASS or UNTRAINED_CLASS
    text: str


class ImageDataset(ABC):
    """A labelled set of images in a fixed order, without transforms or tensors.

    The constructor reads labels and file lists but decodes no image file. Instances are plain data
    and can be pickled to worker processes.

    Attributes:
        name: Name of the set, as `build_dataset` takes it.
        split: Part of the set, under the set's own name for it ("train", "val" or "test").
        class_names: K names, in the order of the labels.
        labels: [n] int64, each in 0..K-1.
        indices: [n] int64, position of each image in the full set: 0..n-1 unless it is a subset.
        pixel_format: What the images are converted to; that of `full` counts.
        full: The set that `indices` refers to: this one, unless it is a subset.
        faults: Faults found while listing the set; `build_dataset` raises those not tolerated.
        notes: What a user should know about the list, such as files that are not read.
    """

    def __init__(
        self, name: str, split: str, class_names: Sequence[str], labels: Sequence[int] | np.ndarray
    ) -> None:
        """Store names and labels.

        Raises:
            DataError: There are no images, or a label is not a whole number in 0..K-1.
        """
        self.name = name
        self.split = split
        self.class_names = list(class_names)
        self.labels = check_labels(labels, len(self.class_names), f"{name}, split {split!r}")
        self.indices: np.ndarray = np.arange(len(self.labels), dtype=np.int64)
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self.pixel_format = PixelFormat()
        self.full = self

    @property
    def num_classes(self) -> int:
        """K, including classes without images in this split."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return f"{self.name}/{self.split}"

    def rename(self, class_names: Sequence[str]) -> None:
        """Number the classes in the order of `class_names`, which must be the same names.

        Raises:
            DataError: They differ, or a name occurs twice.
        """
        if list(class_names) == self.class_names:
            return
        names, known = set(self.class_names), set(class_names)
        if names != known or len(class_names) != len(known):
            more, missing = (
                first_few(sorted(map(repr, names))) or "none"
                for names in (names - known, known - names)
            )
            raise DataError(
                f"{self.name} has other classes than the model: {more} in the data only, "
                f"{missing} in the model only. Use the data set that the model "
                "was trained on, or weights trained on this one."
            )
        new_label = np.array([list(class_names).index(name) for name in self.class_names])
        self.class_names = list(class_names)
        self.labels = new_label[self.labels]

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Return the image at `index`: mode RGB, or F for gray, upright, in its stored size.

        Raises:
            DataError: The image file cannot be read.
        """

    def _to_gray(self, image: Image.Image) -> Image.Image:
        """Convert an image that does not come from a file, whose mode is of no interest."""
        gray = self.pixel_format.convert(image)
        gray.info = {}
        return gray

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name the sample for a message: its path, or its position in the set's file."""


class DatasetSubset(ImageDataset):
    """Some images of a set; classes, class order and labels stay those of the full set.

    Attributes:
        indices: [n] int64, ascending, position of each image in `full`, which is never a subset.
    """

    def __init__(self, dataset: ImageDataset, indices: np.ndarray) -> None:
        """Select the images at `indices` (whole numbers in 0..len(dataset)-1) of `dataset`."""
        chosen = np.sort(np.asarray(indices, dtype=np.int64))
        super().__init__(dataset.name, dataset.split, dataset.class_names, dataset.labels[chosen])
        self.full = dataset.full
        self.indices = dataset.indices[chosen]
        self.faults = dataset.faults
        self.notes = dataset.notes

    def image(self, index: int) -> Image.Image:
        return self.full.image(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.full.describe(int(self.indices[index]))


def evenly_spaced(count: int, number: int) -> list[int]:
    """Return at most `number` of the positions 0..count-1, evenly spaced."""
    return np.linspace(0, count - 1, min(number, count)).round().astype(int).tolist()


def stratified_subset(dataset: ImageDataset, fraction: float, seed: int) -> ImageDataset:
    """Keep round(fraction * n) images in their order, each class in proportion to its size.

    The same seed selects the same images on every machine, and a smaller fraction selects a subset
    of what a larger one selects. Every class keeps at least one image if there is room.

    Args:
        dataset: The set to draw from.
        fraction: Share of the images to keep, in (0, 1]; 1 returns `dataset` itself.
        seed: 0..2^32-1.

    Raises:
        DataError: No image would be left.
    """
    if fraction == 1:
        return dataset
    num_kept = round(fraction * len(dataset))
    if num_kept == 0:
        raise DataError(
            f"fraction {fraction!r} keeps none of the {len(dataset)} images of {dataset.name}: "
            f"set it to at least {1 / len(dataset):.2g}"
        )
    return DatasetSubset(dataset, stratified_order(dataset.labels, seed)[:num_kept])


def class_weights(dataset: ImageDataset) -> np.ndarray:
    """Return weights [K] inverse to the sizes of the classes, 1 on average over the images.

    A class without images has weight 0.
    """
    sizes = np.bincount(dataset.labels, minlength=dataset.num_classes)
    mean = len(dataset) / np.count_nonzero(sizes)
    return np.where(sizes > 0, mean / np.maximum(sizes, 1), 0.0)


def hold_out(
    dataset: ImageDataset, fraction: float, seed: int
) -> tuple[ImageDataset, ImageDataset]:
    """Split a set in two, stratified by class: (what is left, round(fraction * n) held-out images).

    The same seed holds out the same images on every machine, and every class keeps at least one
    image. The held-out part has the split name "held-out".

    Args:
        dataset: The set to split.
        fraction: Share of the images to hold out, in (0, 1).
        seed: 0..2^32-1.

    Raises:
        DataError: One of the parts would be empty.
    """
    kept = stratified_subset(dataset, 1 - fraction, seed)
    others = np.flatnonzero(~np.isin(dataset.indices, kept.indices))
    if not len(others):
        raise DataError(
            f"a fraction of {fraction!r} holds out none of the {len(dataset)} images of "
            f"{dataset.name}: set it to at least {1 / len(dataset):.2g}"
        )
    held_out = DatasetSubset(dataset, others)
    held_out.split = "held-out"
    return kept, held_out


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Order the samples so that every prefix is stratified.

    The k-th drawn sample (k = 0, 1, ...) of a class of m samples gets the position (k + 1/2) / m.
    This is Webster's apportionment: proportional, and unlike the largest-remainder rule it never
    removes a sample when the total grows (the Alabama paradox), so prefixes are nested. The two
    rules agree except for ties and rare cases of very unequal classes. The first sample of each
    class comes before all others, the largest class first.

    Args:
        labels: [n] int64.
        seed: 0..2^32-1.

    Returns:
        [n] int64, a permutation of 0..n-1.

    Source: Balinski and Young, Fair Representation (1982), on house monotonicity.
    """
    # NumPy guarantees the stream of RandomState; that of default_rng may change.
    random = np.random.RandomState(seed).random_sample(len(labels))
    _, groups, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    by_class = np.lexsort((random, groups))
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - starts[groups[by_class]]
    position = (rank + 0.5) / sizes[groups]
    # Break ties (classes of equal size) by the draw; otherwise the same class would always win.
    return np.lexsort((random, position, rank > 0))


def fingerprint(dataset: ImageDataset) -> str:
    """Return the SHA-256 of a full set: its labels in order, and a few of its images.

    A subset has the fingerprint of its full set. An unreadable image is hashed as such.
    """
    full = dataset.full
    digest = hashlib.sha256(full.labels.astype("<i8").tobytes())
    for index in np.linspace(0, len(full) - 1, _NUM_FINGERPRINT_IMAGES).astype(int):
        try:
            image = full.image(int(index))
        except DataError:
            digest.update(b"unreadable")
        else:
            digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def selection_hash(dataset: ImageDataset) -> str:
    """Return the SHA-256 of the classes and labels of the full set and of the images selected."""
    full = dataset.full
    digest = hashlib.sha256("\0".join(full.class_names).encode())
    for numbers in (full.labels, dataset.indices):
        digest.update(np.asarray(numbers).astype("<i8").tobytes() + b";")
    return digest.hexdigest()


def check_labels(labels: Sequence[int] | np.ndarray, num_classes: int, where: str) -> np.ndarray:
    """Return labels as [n] int64 after checking that they are whole numbers in 0..num_classes-1.

    Raises:
        DataError: They are not, or there are none; the message starts with `where`.
    """
    array = np.asarray(labels)
    if array.size == 0:
        raise DataError(f"{where}: there are no images; unpack the data again")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{where}: labels are {array.dtype} of shape {array.shape}, but must be one whole "
            "number per image; download the data again"
        )
    wrong = np.flatnonzero((array < 0) | (array >= num_classes))
    if wrong.size:
        raise DataError(
            f"{where}: the label of image {wrong[0]} is {array[wrong[0]]}, but the {num_classes} "
            f"classes are numbered 0..{num_classes - 1}; labels and class names do not match, "
            "download the data again"
        )
    return array.astype(np.int64)
