#!/usr/bin/env python3
"""Compare the peak memory of training with plain PyTorch code. Print a table, write JSON.

    python benchmarks/memory.py --cfg configs/deit/deit-ti_c100_ours.yaml

For each guided config, measure the peak over a few steps on the same images, each variant in a
separate process: `plain`, the model with torch's AdamW and cross-entropy in a few lines of eager
code; `unguided` and `guided`, this project's training step; if DISTILLATION.FEATURE_FILE is set
with --opts, also `offline`, with other stored features in each step, and `in memory`, with all of
them on the device. Reports resident memory on a CPU and allocated memory on a GPU.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import median_high
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import make_parser, write_json  # noqa: E402
from benchmarks.throughput import ONLINE, STORED, UNGUIDED, train_step  # noqa: E402

WAYS = {"plain": [*UNGUIDED, "TRAIN.REUSE_MEMORY", "False"], "unguided": UNGUIDED, "guided": ONLINE}
OFFLINE = {"offline": STORED, "in memory": [*STORED, "DISTILLATION.FEATURE_PLACE", "device"]}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--cfg", nargs="+", required=True, help="guided configs")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="processes per variant")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/memory.json"))
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides")
    args = parser.parse_args()
    ways = WAYS | (OFFLINE if "DISTILLATION.FEATURE_FILE" in args.opts else {})
    print(f"{'peak memory, MB':<28}" + "".join(f"{way:>10}" for way in ways))
    results = {}
    for config in args.cfg:
        found: dict[str, list[int]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, extra in ways.items():
                found[way].append(measured(config, [*args.opts, *extra], way, args.steps))
        cells = "".join(f"{median_high(values):>10}" for values in found.values())
        print(f"{Path(config).stem:<28}{cells}", flush=True)
        results[Path(config).stem] = found
    write_json(args.out, opts=args.opts, megabytes=results)


def measured(config: str, opts: list[str], way: str, steps: int) -> int:
    """Return the peak memory of a fresh process in MB."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(config, opts, way, steps, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        sys.exit(f"The process that measures {way} exited without a result.")
    finally:
        process.join()


def train(config: str, opts: list[str], way: str, steps: int, send: Any) -> None:
    """Run some steps on one fixed batch and send the peak memory."""
    import torch

    import lg
    from lg import builders
    from lg.device import peak_memory_mb
    from lg.distributed import World

    warnings.simplefilter("ignore")  # a guide without weights takes as much memory
    cfg = lg.load_config(config, [*opts, "OUT_DIR", tempfile.mkdtemp()])
    device = builders.build_device(cfg, World())
    size = cfg.MODEL.IMG_SIZE
    images = torch.randn(cfg.TRAIN.BATCH_SIZE, 3, size, size, device=device)
    labels = torch.arange(cfg.TRAIN.BATCH_SIZE, device=device) % cfg.MODEL.NUM_CLASSES
    work = plain_steps if way == "plain" else our_steps
    work(cfg, images, labels, steps)
    send.send(peak_memory_mb(device))


def plain_steps(cfg: Any, images: Any, labels: Any, steps: int) -> None:
    """Run the steps that a user of plain PyTorch would write."""
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
    """Run steps of this project's training loop."""
    import torch

    from lg import builders
    from lg.augment.view import View
    from lg.datasets.loader import Batch
    from lg.distributed import World
    from lg.logs.log import RunLog

    data = builders.fetch_data(cfg, World())
    run = builders.build_run(cfg, data, World(), RunLog(cfg.OUT_DIR, enabled=False))
    run.module.train()
    view = View().tensor().expand(len(labels), -1)
    indices = torch.from_numpy(data[0].indices)
    for _ in range(steps):
        index = indices[torch.randperm(len(indices))[: len(labels)]]
        train_step(run, Batch(images, labels, index, view))


if __name__ == "__main__":
    main()
