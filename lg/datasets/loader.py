"""Batches: every sample's random draws depend on (seed, epoch, index) alone, every batch's content
on (seed, epoch, step).

So the number of workers changes nothing, and a run that starts in the middle of an epoch sees what
it would have seen.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lg.augment.view import View
from lg.datasets.base import ImageDataset
from lg.errors import DataError

# Second entry of every seed, so that no two uses share a stream.
ORDER, SAMPLE, MIX, MODEL = 1, 2, 3, 4

Transform = Callable[[Image.Image], tuple[Tensor, View]]


class Batch(NamedTuple):
    """N samples of one process."""

    images: Tensor  # [N, 3, S, S], normalised
    labels: Tensor  # [N], int64
    index: Tensor  # type: ignore[assignment]  # [N], int64, positions in the whole data set
    view: Tensor  # [N, 5], see lg.augment.view.View

    def to(self, device: torch.device) -> Batch:
        """The batch with images and labels on a device; the copies overlap with work there when
        the batch is pinned. Index and view stay: stored maps are looked up in host memory."""
        images, labels = (t.to(device, non_blocking=True) for t in self[:2])
        return self._replace(images=images, labels=labels)

    def pin_memory(self) -> Batch:
        """Called by the DataLoader."""
        return Batch(*(t.pin_memory() for t in self))


class _Samples(Dataset[Batch]):
    """Samples of which a data fault travels in place of the batch: a worker that raises it would
    have torch wrap the message in a traceback."""

    def __getitems__(self, keys: Sequence[Any]) -> list[Batch] | DataError:
        """The samples of a batch; called by the DataLoader."""
        try:
            return [self[key] for key in keys]
        except DataError as error:
            return error


class TrainSamples(_Samples):
    """Augmented samples, asked for by (epoch, position)."""

    def __init__(self, dataset: ImageDataset, transform: Transform, *, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, position = key
        image = self.dataset.image(position)
        with _seeded((self.seed, SAMPLE, epoch, position)):
            pixels, view = self.transform(image)
        return _sample(self.dataset, position, pixels, view)


class TestSamples(_Samples):
    """Samples for testing, asked for by position."""

    __test__ = False  # not a test case, whatever its name

    def __init__(self, dataset: ImageDataset, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Batch:
        return _sample(self.dataset, position, *self.transform(self.dataset.image(position)))


class TrainBatches:
    """A batch sampler that runs through all remaining epochs, each a new permutation.

    Global batch s of an epoch is the same whatever the number of processes; each takes its own
    slice. The last batch is dropped when it is not full.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        batch_size: int,
        seed: int,
        max_epoch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert batch_size % world_size == 0 and batch_size <= num_samples
        self.num_samples, self.batch_size, self.seed, self.max_epoch = (
            num_samples,
            batch_size,
            seed,
            max_epoch,
        )
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = num_samples // batch_size
        self.epoch, self.step = 0, 0

    def start(self, epoch: int, step: int) -> None:
        """Sets where iteration begins."""
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        return (self.max_epoch - self.epoch) * self.steps_per_epoch - self.step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world_size
        for epoch in range(self.epoch, self.max_epoch):
            order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.num_samples)
            for step in range(self.step if epoch == self.epoch else 0, self.steps_per_epoch):
                first = step * self.batch_size + self.rank * share
                yield [(epoch, int(i)) for i in order[first : first + share]]


class _Batches(DataLoader[Batch]):
    """Batches, of which one that cannot be read is a DataError."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Workers start here and keep SIGINT blocked: Ctrl-C is the main process's business, which
        # gets it, if it came meanwhile, as soon as it unblocks it.
        with _interrupts_held():
            iterator = super().__iter__()
        return map(_sound, iterator)


def _sound(batch: Batch | DataError) -> Batch:
    if isinstance(batch, DataError):
        # Not `batch` itself: it and this frame would hold each other and so, through the frames
        # below, the loader. One that the garbage collector ends cannot tell its workers to end,
        # and torch then waits 5 s for each.
        raise DataError(str(batch))
    return batch


class TrainLoader:
    """Iterates over training batches; one set of workers serves the whole run.

    A sample that cannot be read is a DataError when its batch is due.
    """

    backend = "workers"  # as DATA_LOADER.BACKEND names it

    def __init__(
        self,
        samples: TrainSamples,
        batches: TrainBatches,
        *,
        num_workers: int,
        pin_memory: bool,
        timeout: float = 0,
    ) -> None:
        """Starts nothing yet.

        Args:
            samples: the images.
            batches: which of them when.
            num_workers: processes that read them; 0: this one.
            pin_memory: whether batches are put into page-locked memory, with a GPU.
            timeout: seconds after which a batch that does not come from them is a RuntimeError; 0:
                never.
        """
        self.batches = batches
        self._loader: DataLoader[Batch] | None = _data_loader(
            samples, num_workers, pin_memory, timeout, batch_sampler=batches
        )
        self._iterator: Iterator[Batch] | None = None
        # Batches that workers make ready ahead of time; torch's default is two a worker.
        self.num_prefetched = 2 * usable_workers(num_workers)

    def __str__(self) -> str:
        count = self.num_prefetched // 2
        return f"images are read and augmented by {count or 'no'} worker processes"

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    def start(self, epoch: int, step: int) -> None:
        """Sets the position of the next batch; `next` goes on from there through all epochs."""
        self.batches.start(epoch, step)
        assert self._loader is not None, "the loader is closed"
        self._iterator = iter(self._loader)

    def close(self) -> None:
        """Ends the workers now, rather than whenever the garbage collector comes to it."""
        self._iterator = self._loader = None

    def __next__(self) -> Batch:
        assert self._iterator is not None, "start() comes first"
        return next(self._iterator)


def test_loader(
    samples: TestSamples,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    rank: int = 0,
    world_size: int = 1,
    first: int = 0,
    timeout: float = 0,
) -> DataLoader[Batch]:
    """Batches of one process's share of the samples from `first` on, in order; over all processes
    every sample comes exactly once."""
    batches = shares(
        len(samples), batch_size=batch_size, rank=rank, world_size=world_size, first=first
    )
    return _data_loader(samples, num_workers, pin_memory, timeout, batch_sampler=batches)


test_loader.__test__ = False  # type: ignore[attr-defined]


def shares(
    count: int, *, batch_size: int, rank: int, world_size: int, first: int = 0
) -> list[list[int]]:
    """The batches of one process, of positions from `first` to `count`; over all processes every
    position comes exactly once."""
    mine = range(first + rank, count, world_size)
    size = max(1, batch_size // world_size)
    return [list(mine[i : i + size]) for i in range(0, len(mine), size)]


def usable_workers(wanted: int) -> int:
    """Worker processes to start: never more than the cores this process may use."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(wanted, cores)


def _data_loader(
    samples: Dataset, num_workers: int, pin_memory: bool, timeout: float, *, batch_sampler: object
) -> DataLoader[Batch]:
    num_workers = usable_workers(num_workers)
    return _Batches(
        samples,
        batch_sampler=batch_sampler,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        collate_fn=_collate,
        persistent_workers=num_workers > 0,
        timeout=timeout if num_workers else 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else each pass would draw from the model's generator
    )


def _collate(samples: list[Batch] | DataError) -> Batch | DataError:
    if isinstance(samples, DataError):
        return samples
    return Batch(*(torch.stack(column) for column in zip(*samples, strict=True)))


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker(worker: int) -> None:
    """One thread a worker, which SIGTERM ends at once, whatever the main process does with it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _sample(dataset: ImageDataset, position: int, pixels: Tensor, view: View) -> Batch:
    label, index = int(dataset.labels[position]), int(dataset.indices[position])
    return Batch(pixels, torch.tensor(label), torch.tensor(index), view.tensor())


@contextlib.contextmanager
def _seeded(key: tuple[int, ...]) -> Iterator[None]:
    """The global generators that augmentation draws from, seeded inside and put back after."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
