"""Work of several processes for tests/distributed/test_world.py.

`python distributed_cases.py CASE PROCESSES FOLDER`: each process writes its process id
to FOLDER/RANK.pid and its results to FOLDER/RANK.pt.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import lg
import lg.distributed.launch
from lg import builders, distributed, trainer
from lg.datasets.loader import Batch, TrainBatches
from lg.device import Precision
from lg.metrics import TestMeter
from lg.models import resnet
from lg.optim import WeightAverage
from lg.run import Progress
from lg.step import accumulate_gradients, update_weights
from tests.run_cases import dotted, key_values
from tests.test_metrics import SAMPLES, logits_of

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = torch.device("cpu")
SIZES = {
    "DEVICE": "cpu",
    "MODEL.IMG_SIZE": 32,
    "MODEL.NUM_CLASSES": 5,
    "TRANSFORMER.PATCH_SIZE": 8,
    "TRANSFORMER.HIDDEN_DIM": 16,
    "TRANSFORMER.DEPTH": 3,
    "TRANSFORMER.NUM_HEADS": 2,
    "TRANSFORMER.DROP_PATH_RATE": 0.0,
    "CNN.DEPTH": 8,
    "DISTILLATION.INTER_STUDENT_INDEX": [0, 1, 2],
    "DISTILLATION.INTER_TEACHER_INDEX": [0, 1, 2],
    "DISTILLATION.TEACHER_WEIGHTS": None,
    "TRAIN.BATCH_SIZE": 12,
}
NUM_IMAGES = 12
VARIANTS: dict[str, dict[str, Any]] = {
    "at once": {},
    "in two parts": {"TRAIN__ACCUM_STEPS": 2},
    "mixture": {"DISTILLATION__INTER_STUDENT_INDEX": "mix"},
    "guidance over": {"DISTILLATION__SCHEDULE": "until", "DISTILLATION__SCHEDULE_EPOCH": 1},
}


def config(**changes: Any) -> Any:
    values = SIZES | dotted(changes)
    return lg.load_config(CONFIGS / "deit/deit-ti_c100_ours.yaml", key_values(values))


def guided_run(world: distributed.World, *, precision: Precision, **changes: Any) -> Any:
    """Return a DeiT that a ResNet guides through linear heads, in float64, in its second epoch."""
    cfg = config(**changes)
    torch.manual_seed(0)
    guided, guide, loss = builders.build_guided(cfg)
    guided.double()
    guide.double()
    module = DistributedDataParallel(guided) if world.size > 1 else guided
    return SimpleNamespace(
        guided=guided,
        module=module,
        guide=guide,
        loss=loss,
        schedule=builders.build_schedule(cfg),
        progress=Progress(epoch=1),
        precision=precision,
        optimizer=builders.build_optimizer(cfg, guided),
        settings=SimpleNamespace(accum_steps=cfg.TRAIN.ACCUM_STEPS, clip_norm=0.0),
    )


def share_of_batch(world: distributed.World) -> tuple[Batch, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    images = torch.randn(NUM_IMAGES, 3, 32, 32, generator=random, dtype=torch.float64)
    targets = torch.rand(NUM_IMAGES, 5, generator=random, dtype=torch.float64).softmax(dim=1)
    index, view = torch.arange(NUM_IMAGES), torch.zeros(NUM_IMAGES, 5)
    batch = Batch(images, targets.argmax(dim=1), index, view)
    share = slice(world.rank, NUM_IMAGES, world.size)
    return Batch(*(column[share] for column in batch)), targets[share]


def gradients(world: distributed.World) -> dict[str, Any]:
    """Return the gradients of one batch in each variant."""
    found = {}
    for variant, changes in VARIANTS.items():
        run = guided_run(world, precision=Precision(CPU), **changes)
        accumulate_gradients(run, *share_of_batch(world))
        run.optimizer.zero_grad(set_to_none=True)
        # The second pass fails if the first one left parameters without gradients.
        losses, _ = accumulate_gradients(run, *share_of_batch(world))
        found[variant] = {
            "loss": distributed.sum_over_processes(losses["loss"].clone()) / world.size,
            "gradients": {n: p.grad for n, p in run.guided.named_parameters()},
        }
    return found


def overflow(world: distributed.World) -> dict[str, Any]:
    """Take a step in which one process has a non-finite gradient."""
    precision = Precision(CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run = guided_run(world, precision=precision)
    before = {n: p.detach().clone() for n, p in run.guided.named_parameters()}
    batch, targets = share_of_batch(world)
    if world.rank == world.size - 1:
        batch.images[0, 0, 0, 0] = torch.inf
    accumulate_gradients(run, batch, targets)
    update_weights(run)
    same = all(torch.equal(before[n], p) for n, p in run.guided.named_parameters())
    return {"same": same, "scale": precision.scaler.get_scale()}


def shares(world: distributed.World) -> dict[str, Any]:
    """Return the samples of this process and the times of its turn."""
    batches = TrainBatches(
        num_samples=50,
        batch_size=12,
        seed=3,
        max_epoch=2,
        rank=world.rank,
        world_size=world.size,
    )
    return {"keys": list(batches), "turns": turns(world)}


def result(world: distributed.World) -> dict[str, float]:
    """Return the result of a test whose samples the processes share unevenly."""
    meter = TestMeter(2, CPU)
    share = SAMPLES[world.rank :: world.size] if world.size < 3 else SAMPLES[: 7 * world.is_main]
    if share:
        labels = torch.tensor([label for label, _, _ in share])
        meter.add(logits_of([(c, p) for _, c, p in share]), labels)
    return meter.result().rates


def turns(world: distributed.World) -> list[float]:
    started = time.monotonic()
    with distributed.in_turn(world):
        began = time.monotonic()
        time.sleep(0.3)
        ended = time.monotonic()
    return [started, began, ended]


def tested_buffers(world: distributed.World) -> dict[str, Any]:
    """Test a model with BatchNorm whose statistics differ between processes, and its average."""
    torch.manual_seed(0)
    student = resnet(depth=8, img_size=16, num_classes=5)
    images, labels = torch.randn(200, 3, 16, 16), torch.randint(5, (200,))
    average = WeightAverage(student, alpha=1e-3, period=1, batch_size=4, max_epoch=1)
    for number, model in enumerate((student, average.module)):
        statistics = torch.Generator().manual_seed(10 * world.rank + number)
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.normal_(generator=statistics)
    one = Batch(images, labels, torch.arange(200), torch.zeros(200, 5))
    alone = [error_of(model, one) for model in (student, average.module)]
    run = SimpleNamespace(
        guided=SimpleNamespace(student=student),
        average=average,
        settings=SimpleNamespace(num_classes=5, log_period=1),
        precision=Precision(CPU),
        test_loader=[Batch(*(column[world.rank :: world.size] for column in one))],
        report=SimpleNamespace(test_epoch=lambda *_, **__: None),
        progress=Progress(epoch=1),
        device=CPU,
        world=world,
        signals=[],
    )
    trainer.test_epoch(run)  # type: ignore[arg-type]
    return {"alone": alone, "tested": [run.progress.test_err, run.progress.ema_err]}


def error_of(model: torch.nn.Module, batch: Batch) -> float:
    """Return the top-1 error of a model as this process has it."""
    with torch.no_grad():
        wrong = model.eval()(batch.images).argmax(dim=1) != batch.labels
    return 100 * wrong.double().mean().item()


def killed(world: distributed.World) -> dict[str, Any]:
    """Kill one process while the others ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    distributed.barrier()  # all have written their process id
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    return {}


def together(world: distributed.World) -> dict[str, Any]:
    """Run the cases that succeed, in one start."""
    cases = (gradients, overflow, result, shares, tested_buffers)
    return {each.__name__: each(world) for each in cases}


CASES = {each.__name__: each for each in (together, killed)}


def entry(case: str, folder: str) -> None:
    torch.set_num_threads(1)
    world = distributed.join(backend="gloo", device="cpu")
    Path(folder, f"{world.rank}.pid").write_text(str(os.getpid()))
    torch.save(CASES[case](world), Path(folder, f"{world.rank}.pt"))
    distributed.leave()


if __name__ == "__main__":
    name, processes, where = sys.argv[1:]
    lg.distributed.launch.GRACE = 2  # type: ignore[attr-defined]  # seconds; 10 would just take longer
    lg.distributed.launch.launch(
        partial(entry, name, where),
        num_processes=int(processes),
        host="localhost",
        port_range=(10000, 65000),
    )
