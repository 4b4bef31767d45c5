"""Mean and standard deviation of the pixels of a set."""

from __future__ import annotations

from functools import partial

import numpy as np

from lg.datasets.base import ImageDataset
from lg.datasets.scan import map_images

MAX_IMAGES = 4096  # of a larger set, this many evenly spaced images are read
_DECIMALS = 5  # decoders of different machines agree on these
_SMALLEST = 1e-4  # standard deviation; images of one colour only are not divided by 0


def pixel_statistics(dataset: ImageDataset, *, num_threads: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, for pixels from 0 to 1.

    Every image counts the same, whatever its size. The result is rounded to five decimals and does
    not depend on the threads.

    Args:
        dataset: The set.
        num_threads: Threads that read and decode; 0 counts as 1.

    Raises:
        DataError: An image cannot be read.
    """
    count = min(len(dataset), MAX_IMAGES)
    moments = map_images(
        partial(_moments, dataset),
        np.linspace(0, len(dataset) - 1, count).astype(int).tolist(),
        num_threads=num_threads,
        title="mean and standard deviation of the training images",
    )
    mean, square = np.mean(moments, axis=0) / [[255], [255**2]]
    std = np.sqrt(np.maximum(square - mean**2, _SMALLEST**2))
    return mean.round(_DECIMALS).tolist(), std.round(_DECIMALS).tolist()


def _moments(dataset: ImageDataset, position: int) -> np.ndarray:
    """Return the mean and the mean square of each channel of an image, [2, C]."""
    image = dataset.image(position)
    pixels = np.asarray(image, dtype=np.float64).reshape(-1, len(image.getbands()))
    return np.stack([pixels.mean(axis=0), (pixels**2).mean(axis=0)])
