"""A cache of decoded images: each file is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lg.datasets.base import ImageDataset
from lg.datasets.image import pixel_tensor
from lg.device import to_device
from lg.errors import StuckError

_NUM_SIZE_SAMPLES = 16  # images from which the size of all is estimated

Prepare = Callable[[Image.Image], Image.Image]


class ImageCache:
    """The images of a set as tensors (see `pixel_tensor`); threads decode each on first use."""

    def __init__(
        self,
        dataset: ImageDataset,
        prepare: Prepare,
        *,
        device: torch.device,
        num_threads: int,
        timeout: float = 0,
    ) -> None:
        """Create an empty cache.

        Args:
            dataset: The set.
            prepare: Converts an image into the form that is cached.
            device: Device of the cached images.
            num_threads: Threads that read and decode, at least 1.
            timeout: Seconds to wait for an image before a StuckError; 0 waits without limit.
        """
        self.dataset, self.device, self.timeout = dataset, device, timeout
        self._prepare = prepare
        self._images: list[Tensor | Future[Tensor] | None] = [None] * len(dataset)
        self._threads = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="images")

    def prefetch(self, positions: Sequence[int]) -> None:
        """Start decoding the images that are not cached."""
        for position in positions:
            if self._images[position] is None:
                self._images[position] = self._threads.submit(
                    read_prepared, self.dataset, self._prepare, position
                )

    def take(self, positions: Sequence[int]) -> list[Tensor]:
        """Return images on the device of the cache.

        Raises:
            DataError: An image cannot be read.
            StuckError: Timed out waiting for an image.
        """
        self.prefetch(positions)
        return [self._take(position) for position in positions]

    def close(self) -> None:
        """Stop the threads without waiting; queued images are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _take(self, position: int) -> Tensor:
        image = self._images[position]
        assert image is not None, "call prefetch() first"
        if isinstance(image, Future):
            try:
                decoded = image.result(self.timeout or None)
            except futures.TimeoutError:  # not the builtin TimeoutError in Python 3.10
                raise StuckError(
                    f"{self.dataset.describe(position)}: timed out after {self.timeout:g} s "
                    "waiting for the image; check its disk or network, or raise DATA_LOADER.TIMEOUT"
                ) from None
            self._images[position] = image = to_device(decoded, self.device)
        return image


def read_prepared(dataset: ImageDataset, prepare: Prepare, position: int) -> Tensor:
    """Read an image and convert it into the form that is cached, see `pixel_tensor`."""
    return pixel_tensor(prepare(dataset.image(position)))


def cache_bytes(dataset: ImageDataset, prepare: Prepare) -> int:
    """Estimate the size of a set's decoded images in bytes from a sample of them."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, _NUM_SIZE_SAMPLES).astype(int))
    sizes = [read_prepared(dataset, prepare, int(position)).nbytes for position in chosen]
    return int(len(dataset) * np.mean(sizes))
