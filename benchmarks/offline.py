#!/usr/bin/env python3
"""What does guidance cost, online and offline? Times training steps, and measures memory.

    python benchmarks/offline.py --bank temp/r-56_c100 --cfg configs/deit/deit-ti_c100_ours.yaml
    python benchmarks/offline.py --bank temp/r-56_c100_32 --cfg FILE KEY VALUE ...

Steps of unguided, online guided and offline guided training alternate in one process, on one batch
in place (guide, forward, loss, backward, optimiser; no loader). Then a training process with 4
workers is started for each way of keeping the features, and its peak resident memory is read: the
bank as it is, and whole arrays in memory, as the published code keeps them. Writes offline.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lg  # noqa: E402
from lg import builders  # noqa: E402
from lg.datasets.loader import Batch  # noqa: E402
from lg.distributed import World  # noqa: E402
from lg.guidance import FeatureBank  # noqa: E402

WAYS = {
    "unguided": ["DISTILLATION.ENABLE_INTER", "False", "DISTILLATION.OFFLINE", "False"],
    "online": ["DISTILLATION.OFFLINE", "False"],
    "offline": ["DISTILLATION.OFFLINE", "True"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", required=True, help="of a guided training")
    parser.add_argument("--bank", required=True, help="the feature file for it")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory-steps", type=int, default=20, help="0: leave memory out")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/offline.json"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    opts = [*args.opts, "DISTILLATION.FEATURE_FILE", args.bank]
    times = time_steps(args.cfg, opts, args.repeats)
    size = lg.load_config(args.cfg, opts).TRAIN.BATCH_SIZE
    print(f"{'':<12}{'s/step':>9}{'quartiles':>18}{'images/s':>11}{'over unguided':>15}")
    for way, seconds in times.items():
        low, middle, high = quantiles(seconds, n=4)
        ratio = middle / median(times["unguided"])
        print(
            f"{way:<12}{middle:>9.4f}{f'{low:.4f}-{high:.4f}':>18}{size / middle:>11.1f}"
            f"{100 * (ratio - 1):>14.1f}%",
            flush=True,
        )
    memory = {}
    if args.memory_steps:
        for way in ("unguided", "bank", "whole arrays"):
            memory[way] = peak_memory(args.cfg, opts, way, args.memory_steps)
            print(f"peak resident memory, {way}: {memory[way]:.0f} MB", flush=True)
    about = {"machine": platform.machine(), "torch": torch.__version__, "batch_size": size}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**about, "seconds": times, "memory_mb": memory}, indent=2))


def time_steps(config: str, opts: list[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of every step, the three ways in turn."""
    steps = {way: make_step(config, [*opts, *extra]) for way, extra in WAYS.items()}
    times: dict[str, list[float]] = {way: [] for way in steps}
    for repeat in range(repeats + 2):
        for way, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat >= 2:
                times[way].append(time.perf_counter() - started)
    return times


def make_step(config: str, opts: list[str]) -> Callable[[], None]:
    """A training step on one batch of the training set."""
    cfg = lg.load_config(config, opts)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a guide without weights takes as long
        guided, guide, loss = lg.build_guided(cfg)
    dataset = builders.build_train_data(cfg)
    builders.prepare_bank(cfg, guide, dataset, torch.device("cpu"))
    batch = first_batch(cfg, dataset)
    optimizer = builders.build_optimizer(cfg, guided.train())
    targets = F.one_hot(batch.labels, cfg.MODEL.NUM_CLASSES).float()

    def step() -> None:
        logits, maps = guided(batch.images)
        terms = loss(logits, maps, targets, *guide(batch.images, batch.index, batch.view))
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def first_batch(cfg: Any, dataset: Any) -> Batch:
    """An augmented batch; its workers end here."""
    loader = builders.build_train_loader(cfg, dataset, World(), torch.device("cpu"))
    loader.start(0, 0)
    batch = next(loader)
    loader.close()
    return batch


def peak_memory(config: str, opts: list[str], way: str, steps: int) -> float:
    """Peak resident memory in MB of a process that trains, its workers not counted."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=train_a_little, args=(config, opts, way, steps, send))
    process.start()
    send.close()
    megabytes = receive.recv()
    process.join()
    return megabytes


def train_a_little(config: str, opts: list[str], way: str, steps: int, send: Any) -> None:
    """Trains some steps and sends the peak of resident memory."""
    extra = WAYS["unguided" if way == "unguided" else "offline"]
    workers = ["DATA_LOADER.BACKEND", "workers", "DATA_LOADER.NUM_WORKERS", "4"]
    cfg = lg.load_config(config, [*opts, *extra, *workers])
    guided, guide, loss = lg.build_guided(cfg)
    dataset = builders.build_train_data(cfg)
    if way == "whole arrays":
        assert isinstance(guide, FeatureBank)
        guide._arrays = [np.array(array, dtype=np.float32) for array in guide._arrays]
    loader = builders.build_train_loader(cfg, dataset, World(), torch.device("cpu"))
    optimizer = builders.build_optimizer(cfg, guided.train())
    loader.start(0, 0)
    for _ in range(steps):
        batch = next(loader)
        targets = F.one_hot(batch.labels, cfg.MODEL.NUM_CLASSES).float()
        logits, maps = guided(batch.images)
        terms = loss(logits, maps, targets, *guide(batch.images, batch.index, batch.view))
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loader.close()
    send.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
