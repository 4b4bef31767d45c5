"""Decoded images in memory: each is read from its file once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lg.datasets.base import ImageDataset
from lg.device import to_device
from lg.errors import StuckError

_SAMPLE = 16  # images from which the size of all is estimated

Prepare = Callable[[Image.Image], Image.Image]


class ImageCache:
    """The images of a set as [H, W, 3] uint8 tensors, decoded by threads when first asked for."""

    def __init__(
        self,
        dataset: ImageDataset,
        prepare: Prepare,
        *,
        device: torch.device,
        num_threads: int,
        timeout: float = 0,
    ) -> None:
        """Decodes nothing yet.

        Args:
            dataset: The set.
            prepare: Gives an image the form in which it is kept.
            device: Where the images are kept.
            num_threads: Threads that read and decode, at least 1.
            timeout: Seconds after which an image that has not come is a fault; 0: never.
        """
        self.dataset, self.device, self.timeout = dataset, device, timeout
        self._prepare = prepare
        self._images: list[Tensor | Future[Tensor] | None] = [None] * len(dataset)
        self._threads = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="images")

    def prefetch(self, positions: Sequence[int]) -> None:
        """Has threads decode what is not there yet."""
        for position in positions:
            if self._images[position] is None:
                self._images[position] = self._threads.submit(self._decode, position)

    def take(self, positions: Sequence[int]) -> list[Tensor]:
        """Images of the set, on the device of the cache.

        Raises:
            DataError: One cannot be read.
            StuckError: One has not come in time.
        """
        self.prefetch(positions)
        return [self._arrived(position) for position in positions]

    def close(self) -> None:
        """Ends the threads without waiting for what they have not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _arrived(self, position: int) -> Tensor:
        image = self._images[position]
        assert image is not None, "prefetch() comes first"
        if isinstance(image, Future):
            self._images[position] = image = to_device(self._wait(image, position), self.device)
        return image

    def _wait(self, image: Future[Tensor], position: int) -> Tensor:
        try:
            return image.result(self.timeout or None)
        except futures.TimeoutError:  # Python 3.10 has another one of that name
            raise StuckError(
                f"{self.dataset.describe(position)}: the image has not come for "
                f"{self.timeout:g} s; check the disk or network that it is on, or raise "
                "DATA_LOADER.TIMEOUT"
            ) from None

    def _decode(self, position: int) -> Tensor:
        return torch.from_numpy(np.array(self._prepare(self.dataset.image(position))))


def cache_bytes(dataset: ImageDataset, prepare: Prepare) -> int:
    """What the images of a set take once they are decoded, estimated from some of them."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLE).astype(int))
    sizes = [prepare(dataset.image(int(position))).size for position in chosen]
    return int(len(dataset) * np.mean([3 * width * height for width, height in sizes]))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in this machine and its container (control groups v2)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
        most, used = (
            int(Path("/sys/fs/cgroup", name).read_text())
            for name in ("memory.max", "memory.current")
        )
        limits.append(max(0, most - used))
    except (OSError, ValueError, KeyError):
        pass  # no such system, or no limit
    return min(limits)
