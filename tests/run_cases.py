"""Helpers of the tests that train: a small run on the digits, and what it leaves behind."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lg
from lg import trainer
from lg.checkpoint import read_checkpoint
from lg.logs.log import read_json_lines
from lg.signals import Interrupted

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 4  # per epoch
TINY = {
    "DEVICE": "cpu",
    "TRANSFORMER.HIDDEN_DIM": 24,
    "TRANSFORMER.DEPTH": 2,
    "TRANSFORMER.NUM_HEADS": 2,
    "TRANSFORMER.DROP_RATE": 0.1,
    "OPTIM.MAX_EPOCH": 3,
    "OPTIM.WARMUP_EPOCHS": 1,
    "OPTIM.EMA_UPDATE_PERIOD": 1,
    "OPTIM.EMA_ALPHA": 0.01,
    "OPTIM.CLIP_GRAD_NORM": 5.0,
    "TRAIN.FRACTION": 0.1,
    "TRAIN.BATCH_SIZE": 30,
    "TRAIN.STRONG_AUGMENTATION": True,
    "TRAIN.MIXUP_ALPHA": 0.4,
    "TRAIN.CUTMIX_ALPHA": 1.0,
    "TRAIN.LABEL_SMOOTHING": 0.1,
    "TRAIN.KEEP_CHECKPOINTS": 2,
    "TEST.PERIOD": 1,
    "TEST.BATCH_SIZE": 200,
    "DATA_LOADER.NUM_WORKERS": 0,
    "LOG_PERIOD": 3,
    "LOG_PICTURES": False,  # drawing takes longer than training here
}
TIMES = {"time_avg", "time_diff", "time_epoch", "eta", "mem", "images_per_second"}


def dotted(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments as config keys: TRAIN__FRACTION is TRAIN.FRACTION."""
    return {key.replace("__", "."): value for key, value in changes.items()}


def key_values(values: Mapping[str, Any]) -> list[str]:
    """Return KEY VALUE KEY VALUE ... as on the command line."""
    return [str(part) for pair in values.items() for part in pair]


def config(out_dir: Path, guide_file: Path | None, **changes: Any) -> Any:
    """Load a small run on the digits, guided if `guide_file` is given; __ in `changes` is a dot."""
    values = TINY | {"OUT_DIR": out_dir} | dotted(changes)
    name = "vit_digits_ours" if guide_file else "vit_digits_base"
    if guide_file:
        values["DISTILLATION.TEACHER_WEIGHTS"] = guide_file
        values.setdefault("DISTILLATION.INTER_STUDENT_INDEX", [0, 1])
        values.setdefault("DISTILLATION.INTER_TEACHER_INDEX", [0, 2])
    return lg.load_config(CONFIGS / f"digits/{name}.yaml", key_values(values))


def train_and_stop(cfg: Any, steps: int) -> Interrupted:
    """Train, with SIGTERM for this process after that many steps; return how training ended."""
    train_step, done = trainer.train_step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        done.append(1)
        if len(done) == steps:
            signal.raise_signal(signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", counted)
        with pytest.raises(Interrupted) as stop:
            trainer.train(cfg)
    return stop.value


def final_state(out_dir: Path, epoch: int = 3) -> dict[str, Any]:
    state = read_checkpoint(out_dir / f"checkpoints/model_epoch_{epoch:04d}.pyth")
    state["cfg"] = state["cfg"].replace(str(out_dir), "")
    return state


def stats(out_dir: Path) -> list[dict[str, Any]]:
    lines = read_json_lines(out_dir / "log.txt")
    return [
        {k: v for k, v in line.items() if k not in TIMES}
        for line in lines
        if line["_type"] not in ("cfg", "complexity", "machine")
    ]


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Assert that two values are equal to the bit, through dicts and lists."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for i, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    else:
        assert left == right or (math.isnan(left) and math.isnan(right)), where
