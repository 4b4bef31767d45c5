#!/usr/bin/env python3
"""Measure training throughput and compare it with the bare model. Print a table, write JSON.

    python benchmarks/throughput.py --cfg configs/deit/deit-ti_c100_ours.yaml
    python benchmarks/throughput.py --cfg A.yaml B.yaml --against ../other-checkout
    python benchmarks/throughput.py --cfg A.yaml --sweep TRAIN.BATCH_SIZE 8 16 32

For each guided config, in images/s and as a fraction of the ceiling:

    ceiling   the student alone on one fixed batch: forward, loss, backward, optimiser
    loader    loading batches, without training
    unguided  training steps without guidance, each with a new batch
    guided    training steps with online guidance
    offline   training steps with offline guidance, if DISTILLATION.FEATURE_FILE is set
    test      the test loop over cached images

Blocks of steps of all of them alternate. Batches that a loader has prefetched before a block
starts are not counted. `of peak` is the ceiling's FLOP/s divided by the measured FLOP/s of a large
matrix product. Guides need no trained weights. On a GPU, the script also reports where a step
synchronizes with the device. With --against, other checkouts take part in the same alternation.
Each checkout runs its own copy of this script in a separate process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import make_parser, write_json  # noqa: E402

UNGUIDED = ["DISTILLATION.ENABLE_INTER", "False", "DISTILLATION.OFFLINE", "False"]
UNGUIDED += ["CNN.DEPTH", "56"]  # the default, as no guide reads it
ONLINE = ["DISTILLATION.OFFLINE", "False", "DISTILLATION.TEACHER_WEIGHTS", "None"]
STORED = ["DISTILLATION.OFFLINE", "True"]


def main() -> None:
    args = parse_args()
    if args.serve:
        serve(args)
        return
    results = []
    for config in args.cfg:
        for value in args.sweep[1:] or [None]:
            opts = [*args.opts, *([args.sweep[0], value] if value is not None else [])]
            name = Path(config).stem + (f" {value}" if value is not None else "")
            for root, found in compare(args, config, opts).items():
                results.append({"name": name, "checkout": root, **found})
                print(row(results[-1], header=len(results) == 1), flush=True)
    write_json(args.out, opts=args.opts, results=results)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--cfg", nargs="+", required=True, help="guided configs")
    parser.add_argument("--against", nargs="*", default=[], help="other checkouts")
    parser.add_argument(
        "--sweep", nargs="+", default=[], metavar=("KEY", "VALUE"), help="one row per value"
    )
    parser.add_argument("--rounds", type=int, default=7, help="blocks per measurement")
    parser.add_argument("--steps", type=int, default=3, help="steps per block")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/throughput.json"))
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace, config: str, opts: list[str]) -> dict[str, dict[str, Any]]:
    """Return each checkout's results, measured in blocks that alternate between checkouts."""
    roots = [str(ROOT), *args.against]
    servers = {}
    for root in roots:
        checkout = Path(root).resolve()
        command = [sys.executable, str(checkout / "benchmarks/throughput.py"), "--serve"]
        command += ["--cfg", str(Path(config).resolve()), "--steps", str(args.steps)]
        servers[root] = subprocess.Popen(
            [*command, "--opts", *opts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(checkout)},
        )
    facts = {root: ask(server) for root, server in servers.items()}
    ways = facts[roots[0]]["ways"]
    seconds: dict[str, dict[str, list[float]]] = {root: {w: [] for w in ways} for root in roots}
    for round_ in range(args.rounds + 1):
        for way in ways:
            for root in roots:
                result = ask(servers[root], way)
                if round_ > 0:  # round 0 is the warm-up
                    seconds[root][way].append(result)
    for server in servers.values():
        assert server.stdin is not None
        server.stdin.close()
        server.wait()
    return {root: summary(facts[root], seconds[root], args.steps) for root in roots}


def ask(server: subprocess.Popen, way: str | None = None) -> Any:
    """Request a measurement, if one is named, and return the server's next answer."""
    assert server.stdin is not None and server.stdout is not None
    if way is not None:
        server.stdin.write(way + "\n")
        server.stdin.flush()
    line = server.stdout.readline()
    if not line:
        sys.exit(server.wait() or 1)  # the server has printed the error
    return json.loads(line)


def summary(facts: dict[str, Any], seconds: dict[str, list[float]], steps: int) -> dict[str, Any]:
    """Return medians and quartiles in images/s, and median ratios within the rounds."""

    def ratio(way: str, other: str) -> float:
        return median(a / b for a, b in zip(seconds[way], seconds[other], strict=True))

    images = steps * facts["batch_size"]
    spread = {way: quantiles((images / s for s in found), n=4) for way, found in seconds.items()}
    of_peak = facts["step_flops"] * spread["ceiling"][1] / facts["matrix_flops"]
    return {
        **facts,
        "n": len(seconds["ceiling"]),
        "images_per_second": {w: q[1] for w, q in spread.items()},
        "quartiles": {w: [q[0], q[2]] for w, q in spread.items()},
        "of_ceiling": {way: ratio("ceiling", way) for way in seconds},
        "cost_over_unguided": {
            way: ratio(way, "unguided") - 1 for way in ("guided", "offline") if way in seconds
        },
        "ceiling_of_peak": of_peak,
    }


def row(result: dict[str, Any], *, header: bool) -> str:
    """Format a line of the table."""
    ways = ["ceiling", "loader", "unguided", "guided", "offline", "test"]
    lines = []
    if header:
        titles = "".join(f"{way:>17}" for way in ways)
        lines.append(f"{'images/s (of the ceiling)':<28}{titles}{'of peak':>9}  guidance costs")
    cells = ""
    for way in ways:
        text = "-"
        if way in result["images_per_second"]:
            text = f"{result['images_per_second'][way]:.1f}"
            if way not in ("ceiling", "test"):
                text += f" ({result['of_ceiling'][way]:.3f})"
        cells += f"{text:>17}"
    costs = ", ".join(f"{w} {100 * c:+.1f} %" for w, c in result["cost_over_unguided"].items())
    name = result["name"] + ("" if result["checkout"] == str(ROOT) else " (other)")
    lines.append(f"{name:<28}{cells}{100 * result['ceiling_of_peak']:>8.1f}%  {costs}")
    if result["waits"]:
        lines.append(f"  a step synchronizes with the device: {result['waits']}")
    return "\n".join(lines)


def serve(args: argparse.Namespace) -> None:
    """Measure the blocks named on standard input, in the checkout of this script.

    The first line of output is a JSON dict of facts, the others are the seconds of each block.
    Other checkouts' copies of this script must understand each other, so keep this protocol.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # redirect everything else that is printed to standard error
    warnings.simplefilter("ignore")  # a guide without weights is as fast as one with weights

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")

    blocks, facts = prepare(args.cfg[0], args.opts, args.steps)
    answer({**facts, "ways": list(blocks)})
    for line in sys.stdin:
        answer(blocks[line.strip()]())


def prepare(
    config: str, opts: list[str], steps: int
) -> tuple[dict[str, Callable[[], float]], dict[str, Any]]:
    """Return the blocks, functions that run `steps` steps and return the seconds, and facts."""
    import lg
    from lg import builders
    from lg.device import synchronize
    from lg.distributed import World
    from lg.logs.log import RunLog

    runs = {}
    folder = tempfile.mkdtemp()
    kinds = {"unguided": UNGUIDED, "guided": ONLINE}
    if lg.load_config(config, opts).DISTILLATION.FEATURE_FILE:
        kinds["offline"] = STORED
    for kind, extra in kinds.items():
        cfg = lg.load_config(config, [*opts, *extra, "OUT_DIR", folder])
        data = builders.fetch_data(cfg, World())
        runs[kind] = builders.build_run(cfg, data, World(), RunLog(folder, enabled=False))
        runs[kind].module.train()
        runs[kind].loader.start(0, 0)
    plain = runs["unguided"]
    device = plain.device

    def timed(work: Callable[[], Any], unmeasured: int = 0) -> float:
        for _ in range(unmeasured):
            work()
        synchronize(device)
        started = time.perf_counter()
        for _ in range(steps):
            work()
        synchronize(device)
        return time.perf_counter() - started

    def next_batch(run: Any) -> Any:
        return next(run.loader).to(device)

    fixed = next_batch(plain)

    def training(run: Any) -> Callable[[], float]:
        return lambda: timed(lambda: train_step(run, next_batch(run)), run.loader.num_prefetched)

    blocks = {
        "ceiling": lambda: timed(lambda: train_step(plain, fixed)),
        "loader": lambda: timed(lambda: next_batch(plain), plain.loader.num_prefetched),
    }
    blocks |= {kind: training(run) for kind, run in runs.items()}
    blocks["test"] = lambda: test_seconds(plain, steps)
    waits = first_synchronization(blocks["guided"]) if device.type == "cuda" else ""
    return blocks, {**describe(lg.load_config(config, opts), plain), "waits": waits}


def test_seconds(run: Any, steps: int) -> float:
    """Test up to two batches; return the seconds for as many images as `steps` training steps."""
    from lg import trainer
    from lg.device import synchronize

    synchronize(run.device)
    started = time.perf_counter()
    result = trainer.evaluate(
        run.guided.student,
        islice(run.test_loader, min(2, len(run.test_loader))),
        num_classes=run.settings.num_classes,
        precision=run.precision,
    )
    seconds = time.perf_counter() - started
    run.module.train()
    return seconds * steps * run.report.batch_size / result.count


def describe(cfg: Any, run: Any) -> dict[str, Any]:
    """Return the settings, the hardware and the arithmetic that rates are compared with."""
    import torch

    from lg.device import machine_facts
    from lg.models.complexity import complexity

    macs = complexity(run.guided.student, cfg.MODEL.IMG_SIZE)["macs"]
    return {
        "batch_size": cfg.TRAIN.BATCH_SIZE,
        "image_size": cfg.MODEL.IMG_SIZE,
        "precision": str(run.precision),
        "compile": cfg.TRAIN.COMPILE,
        "backend": type(run.loader).__name__,
        "device": machine_facts(run.device)["hardware"],
        "step_flops": 6 * macs,  # 2 per MAC; the backward pass costs twice the forward pass
        "matrix_flops": matrix_rate(run.device, run.precision.dtype or torch.float32),
    }


def train_step(run: Any, batch: Any) -> None:
    """Run one step of the training loop."""
    from lg import step

    losses, hits = step.train_step(run, batch, epoch=0, step=0)
    if run.average is not None:
        run.average.follow(run.guided.student, 0, warming=False)
    run.meter.add(losses, hits)


def matrix_rate(device: Any, dtype: Any) -> float:
    """Return the measured peak FLOP/s of a large matrix product."""
    import torch

    from lg.device import synchronize

    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(9):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


def first_synchronization(block: Callable[[], float]) -> str:
    """Return the first place where a warmed-up block synchronizes with the GPU, or ""."""
    import torch

    block()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


if __name__ == "__main__":
    main()
