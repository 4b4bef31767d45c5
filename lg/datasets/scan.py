"""Decode every image of a set once: find unreadable images, sizes and unusual formats.

n counts the images of a set.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from lg.datasets.base import DatasetSubset, ImageDataset
from lg.datasets.files import FileDataset
from lg.datasets.image import open_with_traits
from lg.errors import DataError

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ImageFacts:
    """Facts about one image.

    Attributes:
        fault: Why it cannot be read, with its name and the fix; empty if it can.
        width: In pixels, upright.
        height: In pixels, upright.
        digest: Hash of size and RGB pixels; equal for identical images.
        traits: Those of `lg.datasets.image.TRAITS` that its file has.
    """

    fault: str = ""
    width: int = 0
    height: int = 0
    digest: bytes = b""
    traits: tuple[str, ...] = ()


def has_image_files(dataset: ImageDataset) -> bool:
    """Whether each image is a separate file, so that single images may be damaged."""
    return isinstance(dataset.full, FileDataset)


def scan(dataset: ImageDataset, *, num_threads: int, title: str = "") -> list[ImageFacts]:
    """Decode every image once, with a progress bar if standard error is a terminal.

    Args:
        dataset: The set.
        num_threads: Threads that read and decode, at least 1.
        title: Title of the bar.

    Returns:
        Facts about the n images, in their order.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of unusual images; the facts report them
        return _map_positions(inspect_image, dataset, num_threads=num_threads, title=title)


def inspect_image(dataset: ImageDataset, position: int) -> ImageFacts:
    """Decode one image and return its facts."""
    full = dataset.full
    traits: tuple[str, ...] = ()
    try:
        if isinstance(full, FileDataset):
            image, traits = open_with_traits(full.paths[int(dataset.indices[position])])
        else:
            image = dataset.image(position)
        content = repr(image.size).encode() + image.tobytes()
    except DataError as error:
        return ImageFacts(fault=str(error))
    except MemoryError:
        where = dataset.describe(position)
        return ImageFacts(fault=f"{where}: the image does not fit into memory; shrink it")
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return ImageFacts("", image.width, image.height, digest, traits)


def find_unreadable(dataset: ImageDataset, *, num_threads: int) -> dict[int, str]:
    """Open every image file; return position -> reason for those that cannot be read.

    Args:
        dataset: The set; nothing is opened if it is not made of image files.
        num_threads: Threads that read and decode, at least 1.
    """
    if not has_image_files(dataset):
        return {}
    title = f"looking for damaged images in {dataset.split}"
    reasons = _map_positions(_reason, dataset, num_threads=num_threads, title=title)
    return {position: reason for position, reason in enumerate(reasons) if reason}


def drop_unreadable(dataset: ImageDataset, unreadable: Mapping[int, str]) -> ImageDataset:
    """Return the set without the unreadable images; indices in the full set do not change.

    Args:
        dataset: The set.
        unreadable: Position -> reason.

    Raises:
        DataError: No image would be left.
    """
    if not unreadable:
        return dataset
    if len(unreadable) == len(dataset):
        raise DataError(
            f"none of the {len(dataset):,} images of {dataset.name}/{dataset.split} can be read. "
            f"The first: {next(iter(unreadable.values()))}"
        )
    keep = np.ones(len(dataset), dtype=bool)
    keep[list(unreadable)] = False
    return DatasetSubset(dataset, np.flatnonzero(keep))


def skip_message(dataset: ImageDataset, unreadable: Mapping[int, str]) -> str:
    """Report how many images are skipped and why, and which classes lose all of their images."""
    first = next(iter(unreadable.values()))
    text = (
        f"skipped {len(unreadable):,} of the {len(dataset):,} images of {dataset.name}/"
        f"{dataset.split}, which cannot be read (DATA_LOADER.ON_ERROR skip). The first: {first}."
    )
    lost = unreadable_classes(dataset, unreadable)
    if lost:
        text += f" As a result, {format_classes(lost)} has no images left."
    return text


def unreadable_classes(dataset: ImageDataset, unreadable: Mapping[int, str]) -> list[str]:
    """Return the names of the classes whose images are all unreadable."""
    lost = np.bincount(dataset.labels[list(unreadable)], minlength=dataset.num_classes)
    counts = np.bincount(dataset.labels, minlength=dataset.num_classes)
    return [dataset.class_names[k] for k in np.flatnonzero((lost > 0) & (lost == counts))]


def format_classes(class_names: Sequence[str], most: int = 5) -> str:
    """Return some class names as the subject of a sentence; the verb is singular."""
    shown = ", ".join(repr(name) for name in class_names[:most])
    more = f" and {len(class_names) - most:,} more" if len(class_names) > most else ""
    return f"{'class' if len(class_names) == 1 else 'each of the classes'} {shown}{more}"


def _reason(dataset: ImageDataset, position: int) -> str:
    try:
        dataset.image(position)
    except DataError as error:
        return str(error)
    return ""


def _map_positions(
    work: Callable[[ImageDataset, int], _Result],
    dataset: ImageDataset,
    *,
    num_threads: int,
    title: str,
) -> list[_Result]:
    """Return `work(dataset, position)` for every position, computed by threads."""
    pool = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="scan")
    try:
        results = pool.map(lambda position: work(dataset, position), range(len(dataset)))
        # `disable=None` shows no bar unless standard error is a terminal.
        bar = tqdm(
            results, desc=title, total=len(dataset), unit=" images", leave=False, disable=None
        )
        return list(bar)
    finally:
        pool.shutdown(cancel_futures=True)
