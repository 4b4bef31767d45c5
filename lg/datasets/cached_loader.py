"""Make batches from cached images, on the GPU if there is one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from lg.augment.batched import BatchTestTransform, BatchTransform
from lg.datasets.cache import ImageCache
from lg.datasets.loader import (
    Batch,
    BatchLoader,
    Keys,
    TrainBatches,
    Transform,
    make_batch,
    rank_batches,
    stack,
)
from lg.device import to_device
from lg.errors import DataError

_LOOKAHEAD = 2  # batches whose images are decoded in advance


class CachedTrainLoader:
    """Iterate over training batches as `TrainLoader` does, with images from a cache.

    On a GPU the next batch is made on a separate stream during the training step.
    """

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
        batches = (
            _make(self.cache, self.transform, keys, self.device) for keys in self._decode_ahead()
        )
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

    def _decode_ahead(self) -> Iterator[Keys]:
        """Yield the keys of each batch while the next images are decoded."""
        ahead: deque[Keys] = deque()
        for keys in self.batches:
            self.cache.prefetch([position for _, position in keys])
            ahead.append(keys)
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
        for number, keys in enumerate(self._batches):
            for later in self._batches[number : number + 1 + _LOOKAHEAD]:
                self.cache.prefetch([position for _, position in later])
            yield _make(self.cache, self.transform, keys, self.device)


TestLoader = BatchLoader | CachedTestLoader


def _make(cache: ImageCache, transform: Transform, keys: Keys, device: torch.device) -> Batch:
    """Copy images to a device, as one tensor if they have the same size, and transform them."""
    images = stack(cache.take([position for _, position in keys]))
    if isinstance(images, Tensor):
        images = to_device(images, device)
    else:
        images = [to_device(image, device) for image in images]
    return make_batch(cache.dataset, transform, images, keys)
