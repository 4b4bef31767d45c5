"""Batches made of cached images, augmented together on the device that trains.

The draws of a batch depend on (seed, epoch, step, process) alone, so that a run that starts in the
middle of an epoch sees what it would have seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lg.augment.batched import BatchTestTransform, BatchTransform, views
from lg.augment.view import View
from lg.datasets.cache import ImageCache
from lg.datasets.loader import SAMPLE, Batch, TrainBatches, shares
from lg.device import to_device
from lg.errors import DataError

_LOOKAHEAD = 2  # batches whose images are decoded ahead of time


class CachedTrainLoader:
    """Iterates over training batches, as `TrainLoader` does.

    On a GPU the next batch is made on a stream of its own while the step of the last one runs.
    """

    backend = "device"  # as DATA_LOADER.BACKEND names it
    num_prefetched = 1

    def __init__(
        self,
        cache: ImageCache,
        transform: BatchTransform,
        batches: TrainBatches,
        *,
        device: torch.device,
    ) -> None:
        self.cache, self.transform, self.batches = cache, transform, batches
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._due: Iterator[tuple[int, int, list[int]]] | None = None
        self._ready: Batch | DataError | None = None

    def __str__(self) -> str:
        return (
            f"images are decoded once, kept on {self.cache.device} and augmented in batches on "
            f"{self.device}"
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    def start(self, epoch: int, step: int) -> None:
        """Sets the position of the next batch; `next` goes on from there through all epochs."""
        self.batches.start(epoch, step)
        self._due, self._ready = self._decoded_ahead(), None

    def close(self) -> None:
        """Ends the threads that decode."""
        self.cache.close()
        self._due = self._ready = None

    def __next__(self) -> Batch:
        assert self._due is not None, "start() comes first"
        if self._stream is None:
            return self._make(*next(self._due))
        if self._ready is None:
            self._make_ahead()
        if self._ready is None:
            raise StopIteration
        if isinstance(self._ready, DataError):
            raise self._ready
        batch, current = self._ready, torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in (batch.images, batch.labels):
            tensor.record_stream(current)
        self._make_ahead()
        return batch

    def _make_ahead(self) -> None:
        assert self._due is not None and self._stream is not None
        due = next(self._due, None)
        with torch.cuda.stream(self._stream):
            try:
                self._ready = self._make(*due) if due is not None else None
            except DataError as error:  # raised when its batch is due
                self._ready = error

    def _make(self, epoch: int, step: int, positions: list[int]) -> Batch:
        images = self.cache.take(positions)
        heights, widths = (np.array([image.shape[i] for image in images]) for i in (0, 1))
        key = (self.batches.seed, SAMPLE, epoch, step, self.batches.rank)
        draws = self.transform.draw(heights, widths, np.random.default_rng(key))
        pixels = self.transform.apply(_together(images, self.device), draws)
        return _batch(self.cache, positions, pixels, views(draws, heights, widths))

    def _decoded_ahead(self) -> Iterator[tuple[int, int, list[int]]]:
        """(epoch, step, positions) of every batch, while the images of the next are decoded."""
        ahead: deque[tuple[int, int, list[int]]] = deque()
        for due in _numbered(self.batches):
            self.cache.prefetch(due[2])
            ahead.append(due)
            if len(ahead) > _LOOKAHEAD:
                yield ahead.popleft()
        yield from ahead


class CachedTestLoader:
    """Iterates over one process's share of the test set, as `test_loader` does."""

    def __init__(
        self,
        cache: ImageCache,
        transform: BatchTestTransform,
        *,
        batch_size: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.cache, self.transform, self.device = cache, transform, device
        self._shares = shares(
            len(cache.dataset), batch_size=batch_size, rank=rank, world_size=world_size
        )

    def __len__(self) -> int:
        return len(self._shares)

    def close(self) -> None:
        """Ends the threads that decode."""
        self.cache.close()

    def __iter__(self) -> Iterator[Batch]:
        for number, positions in enumerate(self._shares):
            for later in self._shares[number : number + 1 + _LOOKAHEAD]:
                self.cache.prefetch(later)
            images = _together(self.cache.take(positions), self.device)
            whole = View().tensor().expand(len(positions), -1)
            yield _batch(self.cache, positions, self.transform.apply(images), whole)


def _together(images: list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """The images on a device, in one tensor if they are of one size."""
    if len({image.shape for image in images}) == 1:
        return to_device(torch.stack(images), device)
    return [to_device(image, device) for image in images]


def _batch(cache: ImageCache, positions: list[int], pixels: Tensor, view: Tensor) -> Batch:
    labels = torch.from_numpy(cache.dataset.labels[positions])
    index = torch.from_numpy(cache.dataset.indices[positions])
    return Batch(pixels, to_device(labels, pixels.device), index, view)


def _numbered(batches: TrainBatches) -> Iterator[tuple[int, int, list[int]]]:
    epoch, step = batches.epoch, batches.step
    for keys in batches:
        if keys[0][0] != epoch:
            epoch, step = keys[0][0], 0
        yield epoch, step, [position for _, position in keys]
        step += 1
