"""The loader: batches depend on seed, epoch and step only."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lg.augment.batched import BatchTestTransform, BatchTransform
from lg.datasets import loader as loader_module
from lg.datasets.base import DatasetSubset, ImageDataset
from lg.datasets.image import PixelFormat
from lg.datasets.loader import (
    Batch,
    Samples,
    TrainBatches,
    TrainLoader,
    test_loader,
    usable_workers,
)
from lg.errors import DataError

SEED = 3


class Noise(ImageDataset):
    """n images of 12 x 12 noise in 5 classes; image 0 may be read from a file."""

    def __init__(self, n: int = 23, file: Path | None = None) -> None:
        super().__init__("noise", "train", list("abcde"), np.arange(n) % 5)
        self.file = file

    def image(self, index: int) -> Image.Image:
        if index == 0 and self.file is not None:
            return PixelFormat().open(self.file)
        pixels = np.random.RandomState(index).randint(0, 256, (12, 12, 3))
        return Image.fromarray(pixels.astype(np.uint8))

    def describe(self, index: int) -> str:
        return f"noise {index}"


class Spy(Noise):
    """Return an image whose colour describes the state of the process that reads it."""

    def image(self, index: int) -> Image.Image:
        blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        levels = (255 * blocked, 255 * default, torch.get_num_threads())
        return Image.new("RGB", (12, 12), levels)


class Buggy(Noise):
    def image(self, index: int) -> Image.Image:
        raise KeyError("a bug")


@pytest.fixture(autouse=True)
def allow_any_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even on a machine with one core."""
    monkeypatch.setattr(loader_module, "usable_workers", lambda wanted: wanted)


def make(
    dataset: ImageDataset | None = None,
    *,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    epochs=3,
) -> TrainLoader:
    dataset = dataset or Noise()
    samples = Samples(dataset, BatchTransform(image_size=8, strong=True, seed=SEED))
    batches = TrainBatches(
        num_samples=len(dataset),
        batch_size=6,
        seed=SEED,
        max_epoch=epochs,
        rank=rank,
        world_size=world,
    )
    return TrainLoader(samples, batches, num_workers=workers, pin_memory=False)


def run_through(loader: TrainLoader, epoch: int = 0, step: int = 0) -> list[Batch]:
    loader.start(epoch, step)
    return [next(loader) for _ in range(len(loader.batches))]


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a, b) for p in pairs for a, b in zip(*p, strict=True))


# --- Training ----------------------------------------------------------------------------------


def test_batches_are_the_same_for_any_number_of_workers() -> None:
    full_pass = run_through(make())
    assert len(full_pass) == 9 and full_pass[0].images.shape == (6, 3, 8, 8)
    assert same(run_through(make(workers=1)), full_pass)
    assert same(run_through(make(workers=2)), full_pass)


def test_labels_indices_and_views_match_the_images() -> None:
    dataset = DatasetSubset(Noise(), np.array([1, 4, 5, 8, 13, 16, 21]))
    samples = Samples(dataset, BatchTransform(image_size=8, strong=False, seed=SEED))
    whole = Samples(dataset, BatchTestTransform(image_size=8))
    keys = [(0, row) for row in range(7)]
    for image, label, index, view, source in zip(
        *samples.__getitems__(keys), whole.__getitems__(keys).images, strict=True
    ):
        assert int(label) == index % 5
        source = source.flip(2) if view[4] else source
        top, left = round(float(view[0]) * 8), round(float(view[1]) * 8)
        left = -left if view[4] else left
        rows, columns = slice(max(-top, 0), 8 - max(top, 0)), slice(max(-left, 0), 8 - max(left, 0))
        inner = source[:, max(top, 0) : 8 + min(top, 0), max(left, 0) : 8 + min(left, 0)]
        assert torch.equal(image[:, rows, columns], inner)
    assert samples.__getitems__(keys).index.tolist() == dataset.indices.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_after_a_resume_equal_those_of_a_full_pass(workers: int) -> None:
    full_pass = run_through(make())
    loader = make(workers=workers)
    for epoch, step in ((1, 2), (0, 0), (2, 0), (0, 3)):  # the same loader is restarted each time
        assert loader.steps_per_epoch == 3
        rest = run_through(loader, epoch, step)
        assert len(rest) == 9 - 3 * epoch - step
        assert same(rest, full_pass[3 * epoch + step :])


def test_restart_while_batches_are_prefetched() -> None:
    full_pass = run_through(make())
    loader = make(workers=2)
    loader.start(0, 0)
    next(loader)  # its workers have prefetched more
    assert same(run_through(loader, 1, 1), full_pass[4:])


def test_each_epoch_has_a_new_permutation() -> None:
    batches = TrainBatches(num_samples=24, batch_size=6, seed=SEED, max_epoch=4)
    assert batches.steps_per_epoch == 4 and len(batches) == 16
    keys = [key for batch in batches for key in batch]
    orders = []
    for epoch in range(4):
        own = keys[24 * epoch : 24 * (epoch + 1)]
        assert {e for e, _ in own} == {epoch}
        orders.append([i for _, i in own])
        assert sorted(orders[-1]) == list(range(24)) and orders[-1] != list(range(24))
    assert len({tuple(order) for order in orders}) == 4
    other = TrainBatches(num_samples=24, batch_size=6, seed=SEED + 1, max_epoch=1)
    assert [i for batch in other for _, i in batch] != orders[0]


def test_an_epoch_has_no_duplicates_and_drops_the_last_batch() -> None:
    batches = TrainBatches(num_samples=23, batch_size=6, seed=SEED, max_epoch=1)
    taken = [i for batch in batches for _, i in batch]
    assert len(taken) == 18 == len(set(taken)) and max(taken) < 23


def test_draws_differ_by_epoch_sample_and_seed() -> None:
    samples, other = (
        Samples(Noise(), BatchTransform(image_size=8, strong=True, seed=s)) for s in (SEED, 4)
    )
    batches = [samples.__getitems__([(epoch, n) for n in (5, 6, 7)]) for epoch in range(4)]
    batches.append(other.__getitems__([(0, n) for n in (5, 6, 7)]))
    assert len({image.numpy().tobytes() for batch in batches for image in batch.images}) == 15


@pytest.mark.parametrize("world", [2, 3])
def test_processes_split_each_batch_in_order(world: int) -> None:
    whole = run_through(make())
    shares = [run_through(make(rank=rank, world=world)) for rank in range(world)]
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=True):
        assert {len(part.index) for part in parts} == {6 // world}
        for columns, column in zip(zip(*parts, strict=True), batch, strict=True):
            assert torch.equal(torch.cat(columns), column)
        indices = [set(part.index.tolist()) for part in parts]
        assert len(set.union(*indices)) == 6


# --- Testing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 10, 23])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_test_sample_is_loaded_once(n: int, world: int) -> None:
    samples = Samples(Noise(n), BatchTestTransform(image_size=8))
    found, sizes = [], []
    for rank in range(world):
        loader = test_loader(
            samples, batch_size=8, num_workers=0, pin_memory=False, rank=rank, world_size=world
        )
        batches = list(loader)
        assert len(loader) == len(batches)
        sizes += [len(b.index) for b in batches]
        found += [int(i) for b in batches for i in b.index]
    assert sorted(found) == list(range(n))
    assert max(sizes) <= max(1, 8 // world)


def test_test_batches_are_the_same_for_any_number_of_workers_and_pass() -> None:
    samples = Samples(Noise(), BatchTestTransform(image_size=8))
    passes = []
    for workers in (0, 1, 2):
        loader = test_loader(samples, batch_size=8, num_workers=workers, pin_memory=False)
        passes += [list(loader), list(loader)]
    assert [len(b.index) for b in passes[0]] == [8, 8, 7]
    assert torch.cat([b.labels for b in passes[0]]).tolist() == [i % 5 for i in range(23)]
    assert all(same(p, passes[0]) for p in passes)


# --- Processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_does_not_change_the_global_generators(workers: int) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    wanted = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    run_through(make(workers=workers, epochs=1))
    samples = Samples(Noise(), BatchTestTransform(image_size=8))
    list(test_loader(samples, batch_size=8, num_workers=workers, pin_memory=False))
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == wanted


def message_of(work: Callable[[], object], kind: type[Exception]) -> str:
    """Return the message of the exception that `work` raises."""
    try:
        work()
    except kind as error:
        # Its frames would keep the loader alive until garbage collection, which takes seconds.
        traceback.clear_frames(error.__traceback__)
        return str(error)
    pytest.fail(f"no {kind.__name__}")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_raises_when_its_batch_is_due(broken: Path, workers: int) -> None:
    dataset = Noise(file=broken)
    alone = message_of(lambda: dataset.image(0), DataError)
    assert str(broken) in alone
    loader = make(dataset, workers=workers)
    keys = list(TrainBatches(num_samples=23, batch_size=6, seed=SEED, max_epoch=3))
    due = next(n for n, batch in enumerate(keys) if any(i == 0 for _, i in batch))
    intact = run_through(make())
    loader.start(0, 0)
    assert same([next(loader) for _ in range(due)], intact[:due])
    assert message_of(lambda: next(loader), DataError) == alone
    samples = Samples(dataset, BatchTestTransform(image_size=8))
    test = test_loader(samples, batch_size=8, num_workers=workers, pin_memory=False)
    assert message_of(lambda: list(test), DataError) == alone


def test_workers_stop_at_once_after_a_broken_image(broken: Path) -> None:
    gc.collect()
    loader = make(Noise(file=broken), workers=2)
    with contextlib.suppress(DataError):
        run_through(loader)
    started = time.perf_counter()
    del loader
    gc.collect()
    assert time.perf_counter() - started < 4  # torch waits 5 s per worker otherwise


@pytest.mark.parametrize("workers", [0, 1])
def test_other_exceptions_keep_their_type(workers: int) -> None:
    loader = make(Buggy(), workers=workers)
    loader.start(0, 0)
    assert "a bug" in message_of(lambda: next(loader), KeyError)


def workers_now() -> Iterator[int]:
    return (child.pid for child in multiprocessing.active_children() if child.pid)


def test_only_the_main_process_handles_signals() -> None:
    before = set(workers_now())
    samples = Samples(Spy(), BatchTestTransform(image_size=4))
    loader = test_loader(samples, batch_size=4, num_workers=2, pin_memory=False)
    seen = next(iter(loader)).images[:, :, 0, 0]
    levels = (
        seen * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])
    ) * 255
    assert (
        levels.round().tolist() == [[255, 255, 1]] * 4
    )  # SIGINT blocked, default SIGTERM, 1 thread
    del loader
    loader = make(workers=2, epochs=4)
    loader.start(0, 0)
    next(loader)
    mine = set(workers_now()) - before
    assert len(mine) >= 2
    for pid in mine:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    assert same([next(loader) for _ in range(11)], run_through(make(epochs=4))[1:])
    assert mine & set(workers_now()) == mine


def test_at_most_one_worker_per_core() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_workers(0) == 0 and usable_workers(1) == 1
    assert usable_workers(10_000) == cores
