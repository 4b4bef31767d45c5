"""One look at every image of a set: can it be read, how large is it, what is odd about it.

n counts the images of a set.
"""

from __future__ import annotations

import hashlib
import sys
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
    """What one image is.

    Attributes:
        fault: Why it cannot be read, naming it and the way out; empty when it can.
        width: In pixels, upright.
        height: In pixels, upright.
        digest: Of size and RGB pixels: equal for images that look exactly alike.
        traits: Those of `lg.datasets.image.TRAITS` that its file has.
    """

    fault: str = ""
    width: int = 0
    height: int = 0
    digest: bytes = b""
    traits: tuple[str, ...] = ()


def is_of_files(dataset: ImageDataset) -> bool:
    """Whether each image is a file of its own, which may be damaged while others are not."""
    return isinstance(_full(dataset), FileDataset)


def scan(dataset: ImageDataset, *, num_threads: int, title: str = "") -> list[ImageFacts]:
    """Decodes every image once, with a bar where standard error is a terminal.

    Args:
        dataset: A set.
        num_threads: Threads that read and decode, at least 1.
        title: Of the bar.

    Returns:
        Facts of the n images, in their order.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of images that are odd: the facts tell
        return _over_all(dataset, look_at, num_threads=num_threads, title=title)


def look_at(dataset: ImageDataset, position: int) -> ImageFacts:
    """Decodes one image."""
    full = _full(dataset)
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
    """Opens every image of a set of files; of those that cannot be read, position -> reason.

    Args:
        dataset: A set; nothing is opened if it is kept in one file.
        num_threads: Threads that read and decode, at least 1.
    """
    if not is_of_files(dataset):
        return {}
    title = f"looking for damaged images in {dataset.split}"
    reasons = _over_all(dataset, _reason, num_threads=num_threads, title=title)
    return {position: reason for position, reason in enumerate(reasons) if reason}


def leave_out(dataset: ImageDataset, unreadable: Mapping[int, str]) -> ImageDataset:
    """The set without the images at these positions; places in the full set stay what they are.

    Args:
        dataset: A set.
        unreadable: Position -> reason.

    Raises:
        DataError: Nothing would be left.
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
    """Says that images are left out, how many and why; and which classes lose all of theirs."""
    first = next(iter(unreadable.values()))
    text = (
        f"skipped {len(unreadable):,} of the {len(dataset):,} images of {dataset.name}/"
        f"{dataset.split}, which cannot be read (DATA_LOADER.ON_ERROR skip). The first: {first}."
    )
    lost = classes_lost(dataset, unreadable)
    if lost:
        text += f" With that, {named(lost)} has no image left."
    return text


def classes_lost(dataset: ImageDataset, unreadable: Mapping[int, str]) -> list[str]:
    """Names of the classes whose images are all unreadable."""
    bad = dataset.labels[list(unreadable)]
    counts, lost = (np.bincount(x, minlength=dataset.num_classes) for x in (dataset.labels, bad))
    return [dataset.class_names[k] for k in np.flatnonzero((lost > 0) & (lost == counts))]


def named(class_names: Sequence[str], most: int = 5) -> str:
    """Some classes by their names, as the subject of a sentence that goes on with "has"."""
    shown = ", ".join(repr(name) for name in class_names[:most])
    more = f" and {len(class_names) - most:,} more" if len(class_names) > most else ""
    return f"{'class' if len(class_names) == 1 else 'each of the classes'} {shown}{more}"


def _reason(dataset: ImageDataset, position: int) -> str:
    try:
        dataset.image(position)
    except DataError as error:
        return str(error)
    return ""


def _full(dataset: ImageDataset) -> ImageDataset:
    return dataset.full if isinstance(dataset, DatasetSubset) else dataset


def _over_all(
    dataset: ImageDataset,
    work: Callable[[ImageDataset, int], _Result],
    *,
    num_threads: int,
    title: str,
) -> list[_Result]:
    """`work(dataset, position)` for every position, by threads."""
    pool = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="scan")
    bar = tqdm(
        total=len(dataset),
        desc=title,
        unit=" images",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    found = []
    try:
        for result in pool.map(lambda position: work(dataset, position), range(len(dataset))):
            found.append(result)
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return found
