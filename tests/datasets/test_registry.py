"""Data sets by name, and the digits."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import lg
from lg.datasets import DATASETS, build_dataset
from lg.errors import DataError


def test_names() -> None:
    assert list(DATASETS) == [
        "digits", "cifar100", "flowers", "tiny_imagenet", "chaoyang", "image_folder",
    ]  # fmt: skip


def test_unknown_name_or_split() -> None:
    with pytest.raises(DataError, match="data set 'CIFAR-100' is unknown: choose from digits, ci"):
        build_dataset("CIFAR-100", "data", "train")
    with pytest.raises(DataError, match="split of digits is 'dev': set it to train, val or test"):
        build_dataset("digits", "data", "dev")


def test_digits() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train, test = (build_dataset("digits", "", split) for split in ("train", "val"))
    assert (len(train), len(test), test.split) == (1200, 597, "test")
    sources = np.concatenate([train.sources, test.sources])  # type: ignore[attr-defined]
    assert sorted(sources) == list(range(1797))
    share = 1200 / 1797 * np.bincount(bunch.target)
    assert np.abs(np.bincount(train.labels) - share).max() < 1
    for each in (train, test):
        for i in (0, 100, 596):
            source = each.sources[i]  # type: ignore[attr-defined]
            image = each.image(i)
            assert (image.mode, image.size) == ("RGB", (8, 8))
            expected = np.floor(bunch.images[source] * 255 / 16 + 0.5)
            assert np.array_equal(np.asarray(image), np.repeat(expected[..., None], 3, axis=2))
            assert each.labels[i] == bunch.target[source]
    pixels = train.pixels  # type: ignore[attr-defined]
    assert (pixels.min(), pixels.max(), len(np.unique(pixels))) == (0, 255, 17)
    assert train.class_names == list("0123456789")


def test_digits_split_never_changes() -> None:
    """Results on the digits are compared across versions of this project."""
    train = build_dataset("digits", "", "train")
    assert zlib.crc32(train.sources.astype("<i8").tobytes()) == 3395910698  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="split of digits is 'all': set it to train, val or test"):
        build_dataset("digits", "", "all")


def test_import_is_light() -> None:
    """Workers import this package; heavy libraries are imported on first use."""
    code = (
        "import sys, lg.datasets.files, lg.datasets.digits, lg.datasets.flowers, "
        "lg.datasets.cifar100; print([m for m in ('scipy', 'sklearn', 'torchvision') "
        "if m in sys.modules])"
    )
    root = Path(lg.__path__[0]).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
