"""Training on a GPU, end to end: `pytest -m gpu`.

`LG_TEST_DEVICE=cpu pytest -m gpu tests/gpu` runs what a CPU can run of the same code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lg
from lg import builders, trainer
from lg.datasets.loader import Batch
from lg.device import Precision
from lg.distributed import World
from lg.guidance import FrozenTeacher
from lg.run import Progress
from lg.step import train_step
from tests.run_cases import CONFIGS, assert_same, config, final_state, stats, train_and_stop

DEVICE = os.environ.get("LG_TEST_DEVICE", "cuda")
ROOT = CONFIGS.parent
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]
FAMILIES = ("deit/deit-ti", "t2t/t2t-7", "pit/pit-ti", "pvt/pvt-ti", "pvtv2/pvtv2-b0")
FAMILIES += ("convit/convit-ti", "cvt/cvt-13")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)


def on_device(folder: Path, guide_file: Path, **changes: Any) -> Any:
    return config(folder, guide_file, DEVICE=DEVICE, TRANSFORMER__DROP_RATE=0.0, **changes)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in stats(folder) if line["_type"] == "train_epoch"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, guide_file: Path) -> list[float]:
    """Return the losses in fp32, uncompiled, of whole batches."""
    folder = tmp_path_factory.mktemp("expected")
    trainer.train(on_device(folder, guide_file, OPTIM__MAX_EPOCH=2))
    return losses(folder)


# CUDA graphs with ACCUM_STEPS > 1 are rejected when the config is loaded (test_rules.py).
@pytest.mark.parametrize(
    "mode, accum_steps",
    [("none", 1), ("none", 2), ("default", 1), ("default", 2), ("reduce-overhead", 1)],
)
@pytest.mark.parametrize(
    "dtype",
    [
        "fp32",
        "bf16",
        pytest.param("fp16", marks=pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")),
    ],
)
def test_digits_end_to_end(
    dtype: str,
    mode: str,
    accum_steps: int,
    expected: list[float],
    guide_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes: dict[str, Any] = {"TRAIN__COMPILE": mode, "TRAIN__ACCUM_STEPS": accum_steps}
    if dtype != "fp32":
        changes |= {"TRAIN__MIXED_PRECISION": True, "TRAIN__AMP_DTYPE": dtype}
    trainer.train(on_device(tmp_path, guide_file, OPTIM__MAX_EPOCH=2, **changes))
    assert "uncompiled" not in capsys.readouterr().err
    # fp16 skips the first steps until the loss scale fits.
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-3 if dtype == "fp32" else 0.1)


def test_resume_is_exact_if_deterministic(tmp_path: Path, guide_file: Path) -> None:
    changes = {"TRAIN__DETERMINISTIC": True, "CUDNN__BENCHMARK": False}
    straight, resumed = (
        on_device(tmp_path / name, guide_file, **changes) for name in ("straight", "resumed")
    )
    trainer.train(straight)
    train_and_stop(resumed, 6)
    trainer.train(resumed)
    left, right = (final_state(tmp_path / name) for name in ("straight", "resumed"))
    assert_same(left, right)


@pytest.mark.parametrize("compile_mode", ["none", "reduce-overhead"])
def test_time_mode(compile_mode: str, tmp_path: Path, guide_file: Path) -> None:
    from lg.tools.timing import time_steps

    few = {"PREC_TIME__WARMUP_ITER": 3, "PREC_TIME__NUM_ITER": 2}
    times = time_steps(on_device(tmp_path, guide_file, TRAIN__COMPILE=compile_mode, **few))
    assert min(times["train_fw_time"], times["train_bw_time"], times["train_step_time"]) > 0


def test_one_process_of_a_group(tmp_path: Path, guide_file: Path) -> None:
    """On a GPU the group uses NCCL, and the host waits on gloo."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    script = ["run_net.py", "--mode", "train", "--cfg", "configs/digits/vit_digits_ours.yaml"]
    settings = {
        "DEVICE": DEVICE,
        "OUT_DIR": tmp_path,
        "DISTILLATION.TEACHER_WEIGHTS": guide_file,
        "OPTIM.MAX_EPOCH": 1,
        "OPTIM.WARMUP_EPOCHS": 0,
        "DATA_LOADER.ON_ERROR": "skip",
    }
    opts = [str(part) for pair in settings.items() for part in pair]
    done = subprocess.run(
        [sys.executable, *torchrun, *script, *opts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Finished 1 epoch." in done.stdout


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_never_waits_for_the_device(name: str) -> None:
    """Apart from the first step, which makes constants."""
    device = builders.build_device(lg.load_config(CONFIGS / f"{name}_c100_ours.yaml",
                                                  ["DEVICE", DEVICE]), World())  # fmt: skip
    opts = ["DISTILLATION.TEACHER_WEIGHTS", "null", "DEVICE", DEVICE, "OPTIM.CLIP_GRAD_NORM", "1"]
    cfg = lg.load_config(CONFIGS / f"{name}_c100_ours.yaml", opts)
    guided, guide, loss = builders.build_guided(cfg)
    assert isinstance(guide, FrozenTeacher)
    run = SimpleNamespace(
        module=guided.to(device).train(),
        guided=guided,
        guide=guide.to(device),
        loss=loss,
        schedule=builders.build_schedule(cfg),
        progress=Progress(),
        mixing=builders.build_mixing(cfg),
        precision=Precision(device),
        optimizer=builders.build_optimizer(cfg, guided),
        world=World(),
        settings=SimpleNamespace(accum_steps=1, clip_norm=1.0, seed=1),
    )
    batch = Batch(
        torch.randn(2, 3, cfg.MODEL.IMG_SIZE, cfg.MODEL.IMG_SIZE, device=device),
        torch.arange(2, device=device),
        torch.arange(2, device=device),
        torch.zeros(2, 5, device=device),
    )
    train_step(run, batch, epoch=0, step=0)  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        terms, _ = train_step(run, batch, epoch=0, step=1)  # type: ignore[arg-type]
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert terms["loss"].isfinite()
