"""Make batches from cached images and augment them together, on the GPU if there is one.

The draws of a batch depend on (seed, epoch, step, rank) alone, so that a run which resumes in the
middle of an epoch gets the same batches.
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
from lg.datasets.loader import SAMPLE, Batch, TrainBatches, rank_batches
from lg.device import to_device
from lg.errors import DataError

_LOOKAHEAD = 2  # batches whose images are decoded in advance


class CachedTrainLoader:
    """Iterate over training batches as `TrainLoader` does, with images from a cache.

    On a GPU the next batch is made on a separate stream during the training step.
    """

    backend = "device"  # value of DATA_LOADER.BACKEND
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
        self._iterator: Iterator[Batch] | None = None

    def __str__(self) -> str:
        return (
            f"images are decoded once, cached on {self.cache.device} and augmented in batches on "
            f"{self.device}"
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    def start(self, epoch: int, step: int) -> None:
        """Set the position of the next batch; `next` continues from there through all epochs."""
        self.batches.start(epoch, step)
        batches = (self._make(*due) for due in self._decode_ahead())
        self._iterator = self._make_ahead(batches) if self.device.type == "cuda" else batches

    def close(self) -> None:
        """Stop the decoding threads."""
        self.cache.close()
        self._iterator = None

    def __next__(self) -> Batch:
        assert self._iterator is not None, "call start() first"
        return next(self._iterator)

    def _make_ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield each batch after the next one is queued on a separate stream."""
        stream = torch.cuda.Stream(self.device)

        def queue_next() -> Batch | DataError | None:
            with torch.cuda.stream(stream):
                try:
                    return next(batches, None)
                except DataError as error:  # raised when its batch is due
                    return error

        batch = queue_next()
        while batch is not None:
            if isinstance(batch, DataError):
                raise batch
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            for tensor in (batch.images, batch.labels):
                tensor.record_stream(current)
            following = queue_next()
            yield batch
            batch = following

    def _make(self, epoch: int, step: int, positions: list[int]) -> Batch:
        images = self.cache.take(positions)
        heights, widths = (np.array([image.shape[i] for image in images]) for i in (0, 1))
        key = (self.batches.seed, SAMPLE, epoch, step, self.batches.rank)
        draws = self.transform.draw(heights, widths, np.random.default_rng(key))
        pixels = self.transform.apply(_stack(images, self.device), draws)
        return _batch(self.cache, positions, pixels, views(draws, heights, widths))

    def _decode_ahead(self) -> Iterator[tuple[int, int, list[int]]]:
        """Yield (epoch, step, positions) of each batch while the next images are decoded."""
        ahead: deque[tuple[int, int, list[int]]] = deque()
        for due in self.batches.steps():
            self.cache.prefetch(due[2])
            ahead.append(due)
            if len(ahead) > _LOOKAHEAD:
                yield ahead.popleft()
        yield from ahead


class CachedTestLoader:
    """Iterate over one process's test batches as `test_loader` does, with images from a cache."""

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
        self._batches = rank_batches(
            len(cache.dataset), batch_size=batch_size, rank=rank, world_size=world_size
        )

    def __len__(self) -> int:
        return len(self._batches)

    def close(self) -> None:
        """Stop the decoding threads."""
        self.cache.close()

    def __iter__(self) -> Iterator[Batch]:
        for number, positions in enumerate(self._batches):
            for later in self._batches[number : number + 1 + _LOOKAHEAD]:
                self.cache.prefetch(later)
            pixels = self.transform.apply(_stack(self.cache.take(positions), self.device))
            yield _batch(self.cache, positions, pixels, View().tensor().expand(len(positions), -1))


def _stack(images: list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """Copy images to a device, as one tensor if they have the same size."""
    if len({image.shape for image in images}) == 1:
        return to_device(torch.stack(images), device)
    return [to_device(image, device) for image in images]


def _batch(cache: ImageCache, positions: list[int], pixels: Tensor, view: Tensor) -> Batch:
    labels = to_device(cache.dataset.labels[positions], pixels.device)
    return Batch(pixels, labels, torch.from_numpy(cache.dataset.indices[positions]), view)
