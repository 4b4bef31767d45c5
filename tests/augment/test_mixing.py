"""Mixing: targets match the share of each image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lg.augment.mixing import Mixing

LABELS = torch.tensor([0, 2, 1, 2, 0, 1, 2, 1])


def flat_images(side: int = 16, height: int | None = None) -> torch.Tensor:
    """Return [8, 3, H, W]: every pixel of image n is n, so that pixels identify their image."""
    images = torch.arange(8.0)[:, None, None, None]
    return images.expand(8, 3, height or side, side).clone()


def rng(number: int = 0) -> np.random.Generator:
    return np.random.default_rng(number)


def test_by_default_targets_are_one_hot_and_images_unchanged() -> None:
    images = flat_images()
    mixed, targets = Mixing(num_classes=3)(images, LABELS, rng())
    assert mixed is images and targets.dtype == torch.float32
    assert targets.tolist() == [[float(label == k) for k in range(3)] for label in LABELS]


def test_smoothing_by_hand() -> None:
    _, targets = Mixing(num_classes=4, smoothing=0.1)(flat_images(), LABELS, rng())
    assert targets[1].tolist() == pytest.approx([0.025, 0.025, 0.925, 0.025])
    assert targets.sum(dim=1).tolist() == pytest.approx([1.0] * 8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_mixes_images_and_targets_by_one_share(smoothing: float) -> None:
    shares = []
    for number in range(50):
        mixing = Mixing(num_classes=8, smoothing=smoothing, mixup_alpha=0.8)
        mixed, targets = mixing(flat_images(), torch.arange(8), rng(number))
        assert torch.equal(mixed.amin((1, 2, 3)), mixed.amax((1, 2, 3)))
        assert targets.sum(dim=1).tolist() == pytest.approx([1.0] * 8)
        # The label of image n is n as well, so that the mean label equals the mixed pixels.
        classes = torch.arange(8.0)
        bare = (targets - smoothing / 8) / (1 - smoothing)
        assert (bare @ classes).tolist() == pytest.approx(mixed[:, 0, 0, 0].tolist(), abs=1e-4)
        own = bare.diagonal()
        shares.append(float(own.min()))
        moved = own < 0.9999
        assert own[moved].tolist() == pytest.approx([float(own.min())] * int(moved.sum()))
    assert len({round(s, 4) for s in shares}) > 40  # a new share for each batch
    # Beta(0.8, 0.8): mean 1/2, standard deviation 0.31
    assert 0.35 < np.mean(shares) < 0.65 and 0.2 < np.std(shares) < 0.42


@pytest.mark.parametrize(("height", "side"), [(16, 16), (10, 23), (7, 7)])
def test_the_share_of_cutmix_is_the_pasted_area(height: int, side: int) -> None:
    areas = []
    for number in range(60):
        images = flat_images(side, height)
        mixed, targets = Mixing(num_classes=8, cutmix_alpha=1.0)(
            images, torch.arange(8), rng(number)
        )
        assert torch.equal(images, flat_images(side, height))  # the input is not modified
        assert targets.sum(dim=1).tolist() == pytest.approx([1.0] * 8)
        for n in range(8):
            # The target of each image is its share of the pixels.
            pixels = torch.bincount(mixed[n, 0].long().flatten(), minlength=8) / (height * side)
            assert targets[n].tolist() == pytest.approx(pixels.tolist(), abs=1e-6)
            assert torch.equal(mixed[n, 0], mixed[n, 2])
            foreign = (mixed[n, 0] != n).nonzero()
            if len(foreign):  # one box
                high, wide = (foreign.amax(0) - foreign.amin(0) + 1).tolist()
                assert high * wide == len(foreign)
                areas.append(len(foreign) / (height * side))
    assert min(areas) < 0.15 and max(areas) > 0.35


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)])
def test_neighbours_are_mixed_and_a_last_image_alone_is_not(alphas: tuple[float, float]) -> None:
    mixing = Mixing(num_classes=7, mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    for number in range(10):
        images = flat_images(9)[:7]
        mixed, targets = mixing(images, torch.arange(7), rng(number))
        share = float(targets[0, 0])
        wanted = torch.zeros(7, 7)
        wanted[range(6), range(6)], wanted[range(6), [1, 0, 3, 2, 5, 4]] = share, 1 - share
        wanted[6, 6] = 1
        torch.testing.assert_close(targets, wanted)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), wanted @ torch.arange(7.0))
        assert torch.equal(mixed[6], images[6])


def test_mixup_and_cutmix_are_equally_likely() -> None:
    mixing = Mixing(num_classes=3, mixup_alpha=1.0, cutmix_alpha=1.0)
    kinds = {"whole": 0, "blend": 0, "box": 0}
    for number in range(400):
        mixed, _ = mixing(flat_images(8), LABELS, rng(number))
        constant = bool((mixed.amin((1, 2, 3)) == mixed.amax((1, 2, 3))).all())
        whole_numbers = bool((mixed == mixed.round()).all())
        kinds["whole" if constant and whole_numbers else "blend" if constant else "box"] += 1
    assert kinds["whole"] < 30  # an empty box
    assert 165 < kinds["blend"] < 235


def test_draws_depend_only_on_the_given_generator() -> None:
    mixing = Mixing(num_classes=3, smoothing=0.1, mixup_alpha=0.8, cutmix_alpha=1.0)
    images = torch.rand(8, 3, 9, 9)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    seen = set()
    for number in range(12):
        first = mixing(images, LABELS, rng(number))
        again = mixing(images, LABELS, rng(number))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        seen.add(round(float(first[0].sum() + first[1][0, 0]), 5))
    assert len(seen) > 8
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
