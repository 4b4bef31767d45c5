#!/usr/bin/env python3
"""Does training take more memory than plain PyTorch code? Prints a table, writes JSON.

    python benchmarks/memory.py --cfg configs/deit/deit-ti_c100_ours.yaml

For each guided config, the peak of some steps on one batch in place, each way in a process of its
own: `plain`, a model, torch's AdamW and cross-entropy in a few lines of eager code; `unguided` and
`guided`, this project's step. Resident memory on a CPU, allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
UNGUIDED = ["DISTILLATION.ENABLE_INTER", "False", "DISTILLATION.OFFLINE", "False"]
ONLINE = ["DISTILLATION.OFFLINE", "False", "DISTILLATION.TEACHER_WEIGHTS", "None"]
WAYS = {"plain": [*UNGUIDED, "TRAIN.REUSE_MEMORY", "False"], "unguided": UNGUIDED, "guided": ONLINE}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", nargs="+", required=True, help="guided configs")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/memory.json"))
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides")
    args = parser.parse_args()
    print(f"{'peak memory, MB':<28}" + "".join(f"{way:>10}" for way in WAYS))
    results = {}
    for config in args.cfg:
        found: dict[str, list[int]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way, extra in WAYS.items():
                found[way].append(measured(config, [*args.opts, *extra], way, args.steps))
        middle = {way: sorted(values)[len(values) // 2] for way, values in found.items()}
        print(f"{Path(config).stem:<28}" + "".join(f"{m:>10}" for m in middle.values()), flush=True)
        results[Path(config).stem] = found
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"opts": args.opts, "megabytes": results}, indent=1))


def measured(config: str, opts: list[str], way: str, steps: int) -> int:
    """Peak memory in MB of a fresh process."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(config, opts, way, steps, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        sys.exit(f"The process that measured {way} has ended without a result.")
    finally:
        process.join()


def train(config: str, opts: list[str], way: str, steps: int, send: Any) -> None:
    """Some steps on a batch in place; sends the peak."""
    import torch

    import lg
    from lg import builders
    from lg.device import peak_memory_mb
    from lg.distributed import World

    warnings.simplefilter("ignore")  # of guides without weights
    cfg = lg.load_config(config, [*opts, "OUT_DIR", tempfile.mkdtemp()])
    device = builders.build_device(cfg, World())
    size = cfg.MODEL.IMG_SIZE
    images = torch.randn(cfg.TRAIN.BATCH_SIZE, 3, size, size, device=device)
    labels = torch.arange(cfg.TRAIN.BATCH_SIZE, device=device) % cfg.MODEL.NUM_CLASSES
    work = plain_steps if way == "plain" else our_steps
    work(cfg, images, labels, steps)
    send.send(peak_memory_mb(device))


def plain_steps(cfg: Any, images: Any, labels: Any, steps: int) -> None:
    """What a user would write."""
    import torch
    import torch.nn.functional as F

    import lg

    model = lg.build_model(cfg).to(images.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels, label_smoothing=cfg.TRAIN.LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def our_steps(cfg: Any, images: Any, labels: Any, steps: int) -> None:
    """The training loop's steps."""
    import torch

    from lg import builders
    from lg.datasets.loader import Batch
    from lg.distributed import World
    from lg.logs.log import RunLog
    from lg.step import train_step

    data = builders.fetch_data(cfg, World())
    run = builders.build_run(cfg, data, World(), RunLog(cfg.OUT_DIR, enabled=False))
    run.module.train()
    batch = Batch(images, labels, torch.arange(len(labels)), torch.zeros(len(labels), 5))
    for _ in range(steps):
        losses, hits = train_step(run, batch, epoch=0, step=0)
        run.meter.add(losses, hits)


if __name__ == "__main__":
    main()
