"""Load batches with worker processes.

What an image looks like depends on (seed, epoch, index) alone, and the images of a batch on
(seed, epoch, step). So batches are the same for any backend and number of workers, and for a run
that resumes in the middle of an epoch.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lg.augment.batched import BatchTestTransform, BatchTransform
from lg.datasets.base import ImageDataset
from lg.datasets.cache import read_prepared
from lg.device import to_device, usable_cores
from lg.errors import DataError

# Second entry of the seeds of `default_rng`, so that no two uses share a random stream.
ORDER, MIX, MODEL = 1, 3, 4

Transform = BatchTransform | BatchTestTransform
Keys = list[tuple[int, int]]  # of the samples of a batch: (epoch, position in the data set)


class Batch(NamedTuple):
    """N samples of one process."""

    images: Tensor  # [N, C, S, S], normalised
    labels: Tensor  # [N], int64
    index: Tensor  # type: ignore[assignment]  # [N], int64, positions in the full data set
    view: Tensor  # [N, 5], see lg.augment.view.View

    def to(self, device: torch.device) -> Batch:
        """Copy images and labels to a device, asynchronously if the batch is pinned.

        Index and view stay in host memory, where stored maps are looked up.
        """
        images, labels = (t.to(device, non_blocking=True) for t in self[:2])
        return self._replace(images=images, labels=labels)


class Samples(Dataset[Batch]):
    """Reads and transforms the images of a batch at once."""

    def __init__(self, dataset: ImageDataset, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitems__(self, keys: Keys) -> Batch | DataError:
        """Return a batch; called by the DataLoader.

        A DataError is returned: if a worker raised it, torch would add the worker's traceback to
        its message.
        """
        try:
            images = [read_prepared(self.dataset, self.transform.prepare, i) for _, i in keys]
        except DataError as error:
            return error
        return make_batch(self.dataset, self.transform, stack(images), keys)


def make_batch(
    dataset: ImageDataset, transform: Transform, images: Tensor | Sequence[Tensor], keys: Keys
) -> Batch:
    """Transform prepared images to a batch on their device."""
    epochs, positions = map(list, zip(*keys, strict=True))
    index = dataset.indices[positions]
    pixels, view = transform(images, epochs=epochs, index=index)
    labels = to_device(dataset.labels[positions], pixels.device)
    return Batch(pixels, labels, torch.from_numpy(index), view)


def stack(images: list[Tensor]) -> Tensor | list[Tensor]:
    """Join images into one tensor if they have the same size."""
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images


class TrainBatches:
    """A batch sampler for all remaining epochs, each a new permutation, or a new sample with
    replacement if there are weights.

    The global batch of a step is the same for any number of processes, each of which takes its own
    slice. The last batch of an epoch is dropped if it is not full.
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
        weights: np.ndarray | None = None,
    ) -> None:
        """Set what is drawn.

        Args:
            num_samples: n.
            batch_size: Samples per step, over all processes.
            seed: Of the order.
            max_epoch: Number of epochs.
            rank: This process.
            world_size: Number of processes.
            weights: [n], relative probability of each sample; None takes each once per epoch.
        """
        assert batch_size % world_size == 0 and batch_size <= num_samples
        self.num_samples, self.batch_size = num_samples, batch_size
        self.seed, self.max_epoch = seed, max_epoch
        self.rank, self.world_size = rank, world_size
        self.probabilities = None if weights is None else weights / weights.sum()
        self.steps_per_epoch = num_samples // batch_size
        self.epoch, self.step = 0, 0

    def start(self, epoch: int, step: int) -> None:
        """Set where iteration begins."""
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        return (self.max_epoch - self.epoch) * self.steps_per_epoch - self.step

    def __iter__(self) -> Iterator[Keys]:
        """Yield the keys of each batch.

        The r-th repeat of a sample in an epoch has the key of epoch + r * max_epoch, so that it is
        augmented in another way.
        """
        first_step = self.step
        for epoch in range(self.epoch, self.max_epoch):
            order = self._order(epoch)
            augment_epochs = epoch + self.max_epoch * _repeats(order)
            for step in range(first_step, self.steps_per_epoch):
                own = self._share(step)
                yield list(zip(augment_epochs[own].tolist(), order[own].tolist(), strict=True))
            first_step = 0

    def _share(self, step: int) -> slice:
        """Return the places of this process's samples of a step in the order of the epoch."""
        size = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * size
        return slice(first, first + size)

    def _order(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch, [n]."""
        random = np.random.default_rng((self.seed, ORDER, epoch))
        if self.probabilities is None:
            return random.permutation(self.num_samples)
        return random.choice(self.num_samples, self.num_samples, p=self.probabilities)


def _repeats(order: np.ndarray) -> np.ndarray:
    """Return how often the sample at each place of an order came before, [n]."""
    by_sample = np.argsort(order, kind="stable")
    in_order = order[by_sample]
    repeats = np.empty_like(order)
    repeats[by_sample] = np.arange(len(order)) - np.searchsorted(in_order, in_order)
    return repeats


class BatchLoader(DataLoader[Batch]):
    """A DataLoader that raises the DataError which a worker returned in place of a batch."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Workers start here and inherit the mask: only the main process handles Ctrl-C, which it
        # receives once it restores its own mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            iterator = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return map(_raise_data_error, iterator)

    def close(self) -> None:
        """Nothing: the workers end with the loader."""


def _raise_data_error(batch: Batch | DataError) -> Batch:
    if isinstance(batch, DataError):
        # A new exception: `batch` and this frame would form a reference cycle that keeps the
        # loader alive. If the garbage collector deletes a loader, torch waits 5 s per worker.
        raise DataError(str(batch))
    return batch


class TrainLoader:
    """Iterate over training batches; the same workers serve the whole run.

    An unreadable sample raises a DataError when its batch is due.
    """

    def __init__(
        self,
        samples: Samples,
        batches: TrainBatches,
        *,
        num_workers: int,
        pin_memory: bool,
        timeout: float = 0,
    ) -> None:
        """Create the loader; `start` starts the workers.

        Args:
            samples: The samples.
            batches: The samples of each batch.
            num_workers: Worker processes; 0 loads in this process.
            pin_memory: Whether to put batches into page-locked memory, if there is a GPU.
            timeout: Seconds to wait for a batch from the workers before a RuntimeError; 0 waits
                without limit.
        """
        self.batches = batches
        self._loader: DataLoader[Batch] | None = _data_loader(
            samples, num_workers, pin_memory, timeout, batch_sampler=batches
        )
        self._iterator: Iterator[Batch] | None = None
        self.num_prefetched = 2 * usable_workers(num_workers)  # torch's default, two per worker

    def __str__(self) -> str:
        count = self.num_prefetched // 2
        workers = f"by {count} worker process{'es' * (count > 1)}" if count else "in this process"
        return f"images are read and augmented {workers}"

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    def start(self, epoch: int, step: int) -> None:
        """Set the position of the next batch; `next` continues from there through all epochs."""
        self.batches.start(epoch, step)
        assert self._loader is not None, "the loader is closed"
        self._iterator = iter(self._loader)

    def close(self) -> None:
        """Stop the workers now, not when the garbage collector runs."""
        self._iterator = self._loader = None

    def __next__(self) -> Batch:
        assert self._iterator is not None, "call start() first"
        return next(self._iterator)


def test_loader(
    samples: Samples,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    rank: int = 0,
    world_size: int = 1,
    first: int = 0,
    timeout: float = 0,
) -> BatchLoader:
    """Create the loader of one process's test batches; see `rank_batches` and `TrainLoader`."""
    batches = rank_batches(
        len(samples.dataset), batch_size=batch_size, rank=rank, world_size=world_size, first=first
    )
    return _data_loader(samples, num_workers, pin_memory, timeout, batch_sampler=batches)


test_loader.__test__ = False  # type: ignore[attr-defined]


def rank_batches(
    count: int, *, batch_size: int, rank: int, world_size: int, first: int = 0
) -> list[Keys]:
    """Return the test batches of one process, of the positions from `first` to `count` in order.

    Each position belongs to exactly one process.
    """
    keys = [(0, position) for position in range(first + rank, count, world_size)]
    size = max(1, batch_size // world_size)
    return [keys[i : i + size] for i in range(0, len(keys), size)]


def usable_workers(wanted: int) -> int:
    """Return the number of workers to start: at most the cores that this process may use."""
    return min(wanted, usable_cores())


def _data_loader(
    samples: Dataset, num_workers: int, pin_memory: bool, timeout: float, *, batch_sampler: object
) -> BatchLoader:
    num_workers = usable_workers(num_workers)
    return BatchLoader(
        samples,
        batch_sampler=batch_sampler,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        collate_fn=_as_is,  # the samples come as a batch
        persistent_workers=num_workers > 0,
        timeout=timeout if num_workers else 0,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # by default each pass draws from the global generator
    )


def _as_is(batch: Any) -> Batch | DataError:
    return batch


def _init_worker(worker: int) -> None:
    """Use one thread per worker, and let SIGTERM end it even if the main process handles that."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
