"""The image cache and its loaders: decoding once, exact resume, errors in order."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lg.augment.batched import BatchTestTransform, BatchTransform, normalise
from lg.augment.mixing import Mixing
from lg.datasets.base import DatasetSubset, ImageDataset
from lg.datasets.cache import ImageCache, cache_bytes
from lg.datasets.cached_loader import CachedTestLoader, CachedTrainLoader
from lg.datasets.loader import MIX, Batch, Samples, TrainBatches, TrainLoader
from lg.device import free_memory
from lg.errors import DataError

CPU = torch.device("cpu")


class Counted(ImageDataset):
    """n noise images, of one or many sizes, with a count of reads per image."""

    def __init__(self, n: int = 23, *, many_sizes: bool = False, broken: int = -1) -> None:
        super().__init__("counted", "train", list("abcde"), [i % 5 for i in range(n)])
        self.many_sizes, self.broken = many_sizes, broken
        self.indices = np.arange(n) + 100
        self.reads: Counter[int] = Counter()
        self._lock = threading.Lock()

    def image(self, index: int) -> Image.Image:
        if index == self.broken:
            raise DataError(f"{self.describe(index)} cannot be read")
        with self._lock:
            self.reads[index] += 1
        size = (12 + index % 3, 12) if self.many_sizes else (12, 12)
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8))

    def describe(self, index: int) -> str:
        return f"image {index}"


def train_loader(
    dataset: Counted, *, strong: bool = True, rank: int = 0, world_size: int = 1, seed: int = 3
) -> CachedTrainLoader:
    transform = BatchTransform(image_size=12, strong=strong, seed=seed)
    cache = ImageCache(dataset, transform.prepare, device=CPU, num_threads=2)
    batches = TrainBatches(
        num_samples=len(dataset),
        batch_size=8,
        seed=seed,
        max_epoch=3,
        rank=rank,
        world_size=world_size,
    )
    return CachedTrainLoader(cache, transform, batches, device=CPU)


def all_batches(loader: CachedTrainLoader, epoch: int = 0, step: int = 0) -> list[Batch]:
    loader.start(epoch, step)
    count = len(loader.batches)
    batches = [next(loader) for _ in range(count)]
    with pytest.raises(StopIteration):
        next(loader)
    return batches


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for mine, theirs in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("many_sizes", [False, True])
def test_each_image_is_read_once(many_sizes: bool) -> None:
    dataset = Counted(many_sizes=many_sizes)
    batches = all_batches(train_loader(dataset))
    assert len(batches) == 6 and set(dataset.reads.values()) == {1}
    assert batches[0].images.shape == (8, 3, 12, 12)
    assert batches[0].images.dtype == torch.float32


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (1, 0), (2, 1)])
def test_batches_after_a_resume_equal_those_of_a_full_pass(
    strong: bool, epoch: int, step: int
) -> None:
    loader = train_loader(Counted(), strong=strong)
    full_pass = all_batches(loader)
    assert_same(all_batches(loader, epoch, step), full_pass[2 * epoch + step :])
    fresh = train_loader(Counted(), strong=strong)
    assert_same(all_batches(fresh, epoch, step), full_pass[2 * epoch + step :])


def test_batches_differ_by_epoch_step_and_seed() -> None:
    one, other = (all_batches(train_loader(Counted(), seed=s)) for s in (3, 4))
    views = [tuple(map(tuple, batch.view.tolist())) for batch in [*one, *other]]
    assert len(set(views)) == 12
    assert not torch.equal(one[0].images, one[2].images)


def test_labels_and_indices_match_the_images() -> None:
    dataset = Counted()
    loader = train_loader(dataset, strong=False)
    for batch in all_batches(loader):
        positions = batch.index - 100
        assert torch.equal(batch.labels, positions % 5)
        for row, position in enumerate(positions.tolist()):
            top, left, _, _, flip = batch.view[row].tolist()
            pixels = torch.from_numpy(np.array(dataset.image(position))).permute(2, 0, 1)
            whole = normalise(pixels[None])[0]
            shown = batch.images[row].flip(2) if flip else batch.images[row]
            y, x = round(top * 12), round(left * 12)
            overlap = shown[:, max(-y, 0) : 12 - max(y, 0), max(-x, 0) : 12 - max(x, 0)]
            source = whole[:, max(y, 0) : 12 + min(y, 0), max(x, 0) : 12 + min(x, 0)]
            torch.testing.assert_close(overlap, source)


# --- One seed, one experiment ------------------------------------------------------------------


def by_workers(
    dataset: Counted, num_workers: int, *, strong: bool, epoch: int = 0, step: int = 0, **share: int
) -> list[Batch]:
    samples = Samples(dataset, BatchTransform(image_size=12, strong=strong, seed=3))
    batches = TrainBatches(num_samples=len(dataset), batch_size=8, seed=3, max_epoch=3, **share)
    loader = TrainLoader(samples, batches, num_workers=num_workers, pin_memory=False)
    loader.start(epoch, step)
    return [next(loader) for _ in range(len(batches))]


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("many_sizes", [False, True])
def test_batches_do_not_depend_on_backend_or_workers(
    strong: bool, many_sizes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lg.datasets.loader.usable_workers", lambda wanted: wanted)
    dataset = Counted(many_sizes=many_sizes)
    cached = all_batches(train_loader(dataset, strong=strong))
    for workers in (0, 1, 2):
        assert_same(by_workers(dataset, workers, strong=strong), cached)
    assert_same(by_workers(dataset, 0, strong=strong, epoch=1, step=1), cached[3:])


def test_batches_do_not_depend_on_the_number_of_processes() -> None:
    whole = all_batches(train_loader(Counted(many_sizes=True)))
    for world_size in (2, 4):
        shares = [
            all_batches(train_loader(Counted(many_sizes=True), rank=r, world_size=world_size))
            for r in range(world_size)
        ]
        shares[0] = by_workers(
            Counted(many_sizes=True), 0, strong=True, rank=0, world_size=world_size
        )
        joined = [
            Batch(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)
        ]
        assert_same(joined, whole)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_batches_do_not_depend_on_the_number_of_processes(
    alphas: tuple[float, float],
) -> None:
    mixing = Mixing(num_classes=5, smoothing=0.1, mixup_alpha=alphas[0], cutmix_alpha=alphas[1])

    def mixed(loader: CachedTrainLoader) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            mixing(batch.images, batch.labels, np.random.default_rng((3, MIX, 0, step)))
            for step, batch in enumerate(all_batches(loader))
        ]

    whole = mixed(train_loader(Counted()))
    for world_size in (2, 4):
        shares = [
            mixed(train_loader(Counted(), rank=r, world_size=world_size)) for r in range(world_size)
        ]
        for parts, (images, targets) in zip(zip(*shares, strict=True), whole, strict=True):
            assert torch.equal(torch.cat([part[0] for part in parts]), images)
            assert torch.equal(torch.cat([part[1] for part in parts]), targets)


def test_an_image_looks_the_same_in_a_subset() -> None:
    dataset = Counted(40)
    dataset.indices = np.arange(40)
    subset = DatasetSubset(dataset, np.arange(1, 40, 2))
    whole, part = (
        {
            (step // (len(source) // 8), int(index)): image
            for step, batch in enumerate(all_batches(train_loader(source)))  # type: ignore[arg-type]
            for index, image in zip(batch.index, batch.images, strict=True)
        }
        for source in (dataset, subset)
    )
    both = whole.keys() & part.keys()
    assert len(both) > 30 and all(torch.equal(whole[key], part[key]) for key in both)


# --- Tests, errors, threads --------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_test_image_is_loaded_once_per_pass(world_size: int) -> None:
    dataset = Counted(many_sizes=True)
    transform = BatchTestTransform(image_size=10)
    seen = []
    for rank in range(world_size):
        cache = ImageCache(dataset, transform.prepare, device=CPU, num_threads=1)
        loader = CachedTestLoader(
            cache, transform, batch_size=6, device=CPU, rank=rank, world_size=world_size
        )
        first, second = list(loader), list(loader)
        assert len(first) == len(loader)
        assert_same(first, second)
        seen += [int(i) for batch in first for i in batch.index]
        assert all(batch.view.tolist() == [[0, 0, 1, 1, 0]] * len(batch.index) for batch in first)
    assert sorted(seen) == list(range(100, 123)) and set(dataset.reads.values()) == {1}


def test_a_broken_image_raises_when_its_batch_is_due() -> None:
    loader = train_loader(Counted(broken=7))
    order = np.random.default_rng((3, 1, 0)).permutation(23)  # of epoch 0
    step = int(np.flatnonzero(order == 7)[0]) // 8
    loader.start(0, 0)
    assert len(list(islice(iter(lambda: next(loader), None), step))) == step
    with pytest.raises(DataError, match="image 7 cannot be read"):
        next(loader)


def test_on_a_gpu_the_next_batch_is_queued_before_each_is_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mocked streams record the order of calls."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    current = SimpleNamespace(wait_stream=lambda stream: calls.append(f"wait for {stream}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)

    def make() -> Iterator[SimpleNamespace]:
        for number in range(2):
            calls.append(f"make {number}")
            tensor = SimpleNamespace(
                record_stream=lambda stream, n=number: calls.append(f"use {n}")
            )
            yield SimpleNamespace(images=tensor, labels=tensor, number=number)
        raise DataError("image 7 cannot be read")

    batches = train_loader(Counted())._make_ahead(make())  # type: ignore[arg-type]
    assert next(batches).number == 0  # type: ignore[attr-defined]
    assert calls == ["make 0", "wait for side", "use 0", "use 0", "make 1"]
    assert next(batches).number == 1, "the error is raised too early"  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="image 7 cannot be read"):
        next(batches)


def test_close_stops_the_threads() -> None:
    before = set(threading.enumerate())
    loader = train_loader(Counted())
    loader.start(0, 0)
    next(loader)
    started = set(threading.enumerate()) - before
    assert started
    loader.close()
    for thread in started:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in started)


def test_memory_sizes() -> None:
    transform = BatchTransform(image_size=12, strong=True)
    assert cache_bytes(Counted(), transform.prepare) == 23 * 12 * 12 * 3
    assert 2**27 < free_memory(CPU) < 2**50
