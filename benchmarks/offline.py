#!/usr/bin/env python3
"""What does guidance cost, online and offline? Measure the time and the memory of training steps.

    python benchmarks/offline.py --bank temp/r-56_c100 --cfg configs/deit/deit-ti_c100_ours.yaml
    python benchmarks/offline.py --bank temp/r-56_c100_32 --cfg FILE KEY VALUE ...

Unguided, online guided and offline guided training steps alternate in one process, each on one
fixed batch (guide, forward, loss, backward, optimiser; no loader). Then, for each way to keep the
features, a training process with 4 workers is started and its peak resident memory is measured:
the memory-mapped bank, and whole arrays in memory as in the published code. Writes offline.json.
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
    parser.add_argument("--cfg", required=True, help="config of a guided training")
    parser.add_argument("--bank", required=True, help="folder of its stored features")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory-steps", type=int, default=20, help="0 skips the memory")
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
    """Return the seconds of every step; the three ways take turns."""
    parts = {way: build(config, [*opts, *extra]) for way, extra in WAYS.items()}
    batches = {way: first_batch(*some[:2]) for way, some in parts.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 2):
        for way in WAYS:
            started = time.perf_counter()
            train_step(parts[way], batches[way])
            if repeat >= 2:
                times[way].append(time.perf_counter() - started)
    return times


def build(config: str, opts: list[str]) -> tuple[Any, ...]:
    """Return the config, training set, guided student, guide, loss and optimiser."""
    cfg = lg.load_config(config, opts)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a teacher without weights takes as long
        guided, guide, loss = lg.build_guided(cfg)
    dataset = builders.build_train_data(cfg)
    builders.prepare_bank(cfg, guide, dataset, torch.device("cpu"))
    return cfg, dataset, guided, guide, loss, builders.build_optimizer(cfg, guided.train())


def first_batch(cfg: Any, dataset: Any) -> Batch:
    """Return an augmented batch and stop the loader's workers."""
    loader = builders.build_train_loader(cfg, dataset, World(), torch.device("cpu"))
    loader.start(0, 0)
    batch = next(loader)
    loader.close()
    return batch


def train_step(parts: tuple[Any, ...], batch: Batch) -> None:
    """Train on one batch."""
    cfg, _, guided, guide, loss, optimizer = parts
    targets = F.one_hot(batch.labels, cfg.MODEL.NUM_CLASSES).float()
    logits, maps = guided(batch.images)
    terms = loss(logits, maps, targets, *guide(batch.images, batch.index, batch.view))
    terms["loss"].backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peak_memory(config: str, opts: list[str], way: str, steps: int) -> float:
    """Return the peak resident memory of a training process without its workers, MB."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=train_and_measure, args=(config, opts, way, steps, send))
    process.start()
    send.close()
    megabytes = receive.recv()
    process.join()
    return megabytes


def train_and_measure(config: str, opts: list[str], way: str, steps: int, send: Any) -> None:
    """Train for some steps and send the peak of resident memory, MB."""
    extra = WAYS["unguided" if way == "unguided" else "offline"]
    workers = ["DATA_LOADER.BACKEND", "workers", "DATA_LOADER.NUM_WORKERS", "4"]
    parts = build(config, [*opts, *extra, *workers])
    cfg, dataset, _, guide, _, _ = parts
    if way == "whole arrays":
        assert isinstance(guide, FeatureBank)
        guide._arrays = [np.array(array, dtype=np.float32) for array in guide._arrays]
    loader = builders.build_train_loader(cfg, dataset, World(), torch.device("cpu"))
    loader.start(0, 0)
    for _ in range(steps):
        train_step(parts, next(loader))
    loader.close()
    send.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
