"""The interface of data sets and stratified subsets, on a synthetic set."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from lg.datasets import ImageDataset, stratified_subset
from lg.datasets.base import DatasetSubset, hold_out
from lg.errors import DataError


class Numbers(ImageDataset):
    """Image i is one pixel of brightness i."""

    def __init__(self, labels: list[int] | np.ndarray, num_classes: int) -> None:
        super().__init__("numbers", "train", [f"c{k}" for k in range(num_classes)], labels)

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (1, 1), (index, 0, 0))

    def describe(self, index: int) -> str:
        return f"number {index}"


def numbers(sizes: list[int], seed: int = 0) -> Numbers:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return Numbers(np.random.default_rng(seed).permutation(labels), len(sizes))


def brightness(dataset: ImageDataset, index: int) -> int:
    return int(np.asarray(dataset.image(index))[0, 0, 0])


def counts(dataset: ImageDataset) -> list[int]:
    return np.bincount(dataset.labels, minlength=dataset.num_classes).tolist()


def test_attributes() -> None:
    data = Numbers([1, 0, 1], 3)
    assert (len(data), data.num_classes, data.labels.dtype) == (3, 3, np.int64)
    assert data.labels.tolist() == [1, 0, 1] and data.indices.tolist() == [0, 1, 2]
    assert data.class_names == ["c0", "c1", "c2"]


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([], "there are no images"),
        ([0, 2], "label of image 1 is 2, but the 2 classes are numbered 0..1"),
        ([-1, 0], "label of image 0 is -1"),
        ([0.0, 1.0], "labels are float64"),
        ([[0], [1]], r"shape \(2, 1\)"),
    ],
)
def test_bad_labels(labels: list, problem: str) -> None:
    with pytest.raises(DataError, match=f"^numbers, split 'train': .*{problem}"):
        Numbers(labels, 2)


def test_a_subset_keeps_images_and_order() -> None:
    data = numbers([30, 20, 10])
    part = stratified_subset(data, 0.25, seed=3)
    assert counts(part) in ([8, 5, 2], [7, 5, 3])  # shares of 7.5, 5 and 2.5: the tie is random
    assert np.all(np.diff(part.indices) > 0)
    assert part.labels.tolist() == data.labels[part.indices].tolist()
    for i in range(len(part)):
        assert brightness(part, i) == part.indices[i]
        assert part.describe(i) == f"number {part.indices[i]}"
    assert (part.class_names, part.name, part.split) == (data.class_names, "numbers", "train")


def test_subset_is_stable() -> None:
    """These numbers must never change: they select the images of published runs."""
    data = Numbers([0, 1, 2] * 4, 3)
    assert stratified_subset(data, 0.5, seed=0).indices.tolist() == [1, 2, 4, 6, 9, 11]
    assert stratified_subset(data, 0.5, seed=1).indices.tolist() == [2, 3, 4, 5, 6, 7]
    assert stratified_subset(data, 1, seed=0) is data


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_proportional(seed: int) -> None:
    """Each class has its share rounded down or up, and at least one image."""
    random = np.random.default_rng(seed)
    data = numbers(random.integers(20, 200, size=12).tolist(), seed)
    full = np.array(counts(data))
    for fraction in (0.05, 0.1, 0.33, 0.5, 0.9):
        part = stratified_subset(data, fraction, seed)
        assert len(part) == round(fraction * len(data))
        share = full * len(part) / len(data)
        kept = np.array(counts(part))
        assert np.all(kept >= np.maximum(np.floor(share), 1))
        assert np.all(kept <= np.maximum(np.ceil(share), 1))


def test_equal_classes_differ_by_one_at_most() -> None:
    data = numbers([10] * 7)
    for total in range(1, 70):
        kept = counts(stratified_subset(data, total / 70, seed=5))
        assert sum(kept) == total and max(kept) - min(kept) <= 1


def test_small_classes_keep_one() -> None:
    data = numbers([196, 2, 1, 1])
    assert counts(stratified_subset(data, 0.02, seed=0)) == [1, 1, 1, 1]
    assert counts(stratified_subset(data, 0.1, seed=0)) == [17, 1, 1, 1]
    assert counts(stratified_subset(data, 0.01, seed=0)) == [1, 1, 0, 0]


def test_fractions_are_nested_and_seeds_differ() -> None:
    data = numbers([50, 30, 7, 3])
    previous: set[int] = set()
    for percent in range(2, 100):
        now = set(stratified_subset(data, percent / 100, seed=9).indices.tolist())
        assert previous <= now and len(now) > 0
        previous = now
    one, two = (set(stratified_subset(data, 0.5, seed=s).indices.tolist()) for s in (1, 2))
    assert len(one & two) < 35


def test_a_subset_of_a_subset_refers_to_the_full_set() -> None:
    data = numbers([40, 40])
    half = stratified_subset(data, 0.5, seed=1)
    quarter = stratified_subset(half, 0.5, seed=2)
    assert isinstance(quarter, DatasetSubset) and quarter.full is data
    assert len(quarter) == 20
    assert set(quarter.indices) < set(half.indices)
    assert quarter.labels.tolist() == data.labels[quarter.indices].tolist()
    assert brightness(quarter, 7) == quarter.indices[7]


def test_subset_pickles() -> None:
    part = stratified_subset(numbers([9, 9]), 0.5, seed=1)
    copy = pickle.loads(pickle.dumps(part))
    assert copy.indices.tolist() == part.indices.tolist()
    assert copy.describe(4) == part.describe(4)


def test_a_subset_has_images() -> None:
    with pytest.raises(DataError, match=r"0\.01 keeps none of the 10 images of numbers: .*0\.1"):
        stratified_subset(numbers([5, 5]), 0.01, seed=0)


def test_a_hold_out_is_stratified_and_leaves_each_class_an_image() -> None:
    data = numbers([40, 20, 2, 1])
    kept, held_out = hold_out(data, 0.25, seed=4)
    assert counts(kept) in ([30, 15, 1, 1], [29, 15, 2, 1], [30, 14, 2, 1])
    assert [a + b for a, b in zip(counts(kept), counts(held_out), strict=True)] == [40, 20, 2, 1]
    assert not set(kept.indices) & set(held_out.indices) and len(held_out) == 63 - 47
    assert (kept.split, held_out.split, held_out.name) == ("train", "held-out", "numbers")
    assert held_out.full is data and brightness(held_out, 3) == held_out.indices[3]
    again = hold_out(data, 0.25, seed=4)[1]
    assert again.indices.tolist() == held_out.indices.tolist()
    assert hold_out(data, 0.25, seed=5)[1].indices.tolist() != held_out.indices.tolist()


def test_a_hold_out_of_a_subset_refers_to_the_full_set() -> None:
    data = numbers([40, 40])
    half = stratified_subset(data, 0.5, seed=1)
    kept, held_out = hold_out(half, 0.2, seed=1)
    assert (len(kept), len(held_out), counts(held_out)) == (32, 8, [4, 4])
    assert set(kept.indices) | set(held_out.indices) == set(half.indices)
    assert held_out.full is data


def test_an_empty_hold_out_is_rejected() -> None:
    with pytest.raises(
        DataError, match=r"0\.01 holds out none of the 10 images of numbers: .*0\.1"
    ):
        hold_out(numbers([5, 5]), 0.01, seed=0)
