"""Decode every image of a set once: find unreadable images, sizes and unusual formats."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from tqdm.contrib.concurrent import thread_map

from lg.datasets.base import DatasetSubset, ImageDataset
from lg.datasets.files import FileDataset
from lg.datasets.image import GRAY_MODES
from lg.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class ImageFacts:
    """Facts about one image.

    Attributes:
        fault: Why it cannot be read, with its name and the fix; empty if it can.
        width: In pixels, upright.
        height: In pixels, upright.
        digest: Hash of size and pixels; equal for identical images.
        mode: Pillow's mode of its file; empty if it has no separate file.
        natural_modes: Modes that need no conversion.
    """

    fault: str = ""
    width: int = 0
    height: int = 0
    digest: bytes = b""
    mode: str = ""
    natural_modes: tuple[str, ...] = ("RGB",)


def map_images(
    function: Callable[[int], T], positions: Iterable[int], *, num_threads: int, title: str
) -> list[T]:
    """Call a function for images of a set, with a progress bar if standard error is a terminal.

    Args:
        function: Called with each position.
        positions: In the set.
        num_threads: Threads that read and decode; 0 counts as 1.
        title: Of the progress bar.
    """
    return thread_map(
        function,
        positions,
        max_workers=max(1, num_threads),
        desc=title,
        unit=" images",
        leave=False,
        disable=None,  # no bar unless standard error is a terminal
    )


def scan(dataset: ImageDataset, *, num_threads: int) -> list[ImageFacts]:
    """Decode every image once.

    Args:
        dataset: The set.
        num_threads: Threads that read and decode; 0 counts as 1.

    Returns:
        Facts about the images, in their order.
    """
    title = f"checking the images of {dataset.split}"
    inspect = partial(inspect_image, dataset)
    return map_images(inspect, range(len(dataset)), num_threads=num_threads, title=title)


def inspect_image(dataset: ImageDataset, position: int) -> ImageFacts:
    """Decode one image and return its facts."""
    try:
        image = dataset.image(position)
    except DataError as error:
        return ImageFacts(fault=str(error))
    content = repr(image.size).encode() + image.tobytes()
    digest = hashlib.blake2b(content, digest_size=16).digest()
    natural = GRAY_MODES if image.mode == "F" else ("RGB",)
    return ImageFacts("", image.width, image.height, digest, image.info.get("mode", ""), natural)


def find_unreadable(dataset: ImageDataset, *, num_threads: int) -> dict[int, str]:
    """Open every image file; return position -> reason for those that cannot be read.

    Args:
        dataset: The set; nothing is opened if it is not made of image files.
        num_threads: Threads that read and decode; 0 counts as 1.
    """
    if not isinstance(dataset.full, FileDataset):
        return {}
    images = scan(dataset, num_threads=num_threads)
    return {position: image.fault for position, image in enumerate(images) if image.fault}


def drop_unreadable(dataset: ImageDataset, unreadable: Mapping[int, str]) -> ImageDataset:
    """Return the set without the unreadable images, and a note about them; indices in the full set
    do not change.

    Args:
        dataset: The set.
        unreadable: Position -> reason.

    Raises:
        DataError: No image would be left.
    """
    if not unreadable:
        return dataset
    first = next(iter(unreadable.values()))
    if len(unreadable) == len(dataset):
        raise DataError(
            f"none of the {len(dataset):,} images of {dataset} can be read. The first: {first}"
        )
    left = DatasetSubset(dataset, np.delete(np.arange(len(dataset)), list(unreadable)))
    note = (
        f"skipped {len(unreadable):,} of the {len(dataset):,} images of {dataset}, which cannot be "
        f"read (DATA_LOADER.ON_ERROR skip). The first: {first}"
    )
    left.notes = [*dataset.notes, note]
    return left
