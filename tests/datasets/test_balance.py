"""TRAIN.BALANCE: weights of the classes, balanced sampling, and their exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lg import builders, trainer
from lg.datasets.base import class_weights
from lg.datasets.loader import TrainBatches
from lg.distributed import World
from lg.errors import ConfigError
from lg.guidance import classification_loss
from tests.datasets.test_scan import config, picture
from tests.datasets.test_stratified_subset import numbers
from tests.run_cases import assert_same, final_state, stats, train_and_stop


def unequal(root: Path) -> Path:
    """Create a folder of 12 cats and 4 dogs, and of 2 and 2 to test."""
    for name, train, val in (("cat", 12, 2), ("dog", 4, 2)):
        for number in range(train + val):
            place = root / ("train" if number < train else "val") / name
            place.mkdir(parents=True, exist_ok=True)
            picture(2 * number + (name == "dog")).save(place / f"{number}.png")
    return root


def test_weights_are_inverse_to_the_sizes_and_one_on_average() -> None:
    data = numbers([12, 4, 0])
    weights = class_weights(data)
    assert weights.tolist() == [16 / (2 * 12), 16 / (2 * 4), 0]
    assert weights[data.labels].mean() == pytest.approx(1)


def test_the_weighted_loss_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 3, generator=generator)
    targets = torch.rand(9, 3, generator=generator).softmax(dim=1)
    weights = torch.tensor([2 / 3, 2.0, 0.5])
    expected = F.cross_entropy(logits, targets, weight=weights)
    torch.testing.assert_close(classification_loss(logits, targets, weights), expected)


def test_the_loss_of_a_run_is_weighted(tmp_path: Path) -> None:
    cfg = config(unequal(tmp_path / "set"), tmp_path / "run", TRAIN__BALANCE="weights")
    data = builders.fetch_data(cfg, World())
    weights = builders.data.build_class_weights(cfg, data.train, torch.device("cpu"))
    assert weights is not None and weights.tolist() == pytest.approx([2 / 3, 2.0])
    losses = []
    for kind in ("weights", "none"):
        run = tmp_path / kind
        trainer.train(config(tmp_path / "set", run, TRAIN__BALANCE=kind, OPTIM__MAX_EPOCH=1))
        losses.append(next(line["loss"] for line in stats(run) if line["_type"] == "train_epoch"))
    assert losses[0] != losses[1]


def batches(**changes: Any) -> TrainBatches:
    weights = np.repeat([2 / 3, 2.0], [120, 40])
    options = {"num_samples": 160, "batch_size": 20, "seed": 3, "max_epoch": 30}
    return TrainBatches(**{**options, "weights": weights, **changes})


def test_balanced_sampling_draws_classes_equally_often() -> None:
    keys = [key for batch in batches() for key in batch]
    assert len(keys) == 30 * 160 and len(set(keys)) == len(keys)  # repeats have other keys
    share = np.mean([position >= 120 for _, position in keys])
    assert share == pytest.approx(0.5, abs=0.03)  # 4 standard errors
    assert {epoch % 30 for epoch, _ in keys[:160]} == {0}
    orders = {tuple(p for _, p in keys[160 * e : 160 * (e + 1)]) for e in range(30)}
    assert len(orders) == 30


def test_balanced_sampling_resumes_and_is_shared() -> None:
    whole = list(batches())
    rest = batches()
    rest.start(2, 5)
    assert list(rest) == whole[2 * 8 + 5 :]
    shares = [list(batches(rank=rank, world_size=2)) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize("backend", ["device", "workers"])
def test_resume_with_balanced_sampling_is_exact(tmp_path: Path, backend: str) -> None:
    unequal(tmp_path / "set")
    changes = {"TRAIN__BALANCE": "sampling", "DATA_LOADER__BACKEND": backend}
    straight, stopped = (
        config(tmp_path / "set", tmp_path / name, **changes) for name in ("straight", "stopped")
    )
    trainer.train(straight)
    train_and_stop(stopped, 3)
    trainer.train(stopped)
    last = straight.OPTIM.MAX_EPOCH
    assert_same(*(final_state(tmp_path / name, last) for name in ("straight", "stopped")))


def test_equal_classes_cannot_be_balanced(tmp_path: Path) -> None:
    for number in range(6):
        for split in ("train", "val"):
            for label, name in enumerate(("cat", "dog")):
                place = tmp_path / "set" / split / name
                place.mkdir(parents=True, exist_ok=True)
                picture(2 * number + label).save(place / f"{number}.png")
    for kind in ("weights", "sampling"):
        cfg = config(tmp_path / "set", tmp_path / "run", TRAIN__BALANCE=kind)
        with pytest.raises(ConfigError, match=rf"BALANCE is {kind}, but all classes of the 12"):
            trainer.train(cfg)
