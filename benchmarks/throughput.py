#!/usr/bin/env python3
"""How fast is training, and what of it is the model? Prints a table, writes JSON.

    python benchmarks/throughput.py --cfg configs/deit/deit-ti_c100_ours.yaml
    python benchmarks/throughput.py --cfg A.yaml B.yaml --against ../other-checkout
    python benchmarks/throughput.py --cfg A.yaml --sweep TRAIN.BATCH_SIZE 8 16 32

For each guided config, in images/s and as a fraction of the ceiling:

    ceiling   the student alone on one batch in place: forward, loss, backward, optimiser
    loader    batches made ready and nothing else
    unguided  the training loop's steps, each with a new batch
    guided    the same with the guide; a feature file as DISTILLATION.FEATURE_FILE adds `offline`
    test      the test pass over cached images

Blocks of steps of all of them alternate; what a loader has ready when a block begins is not
counted. `of peak` is the ceiling's arithmetic over the machine's measured matrix rate. Guides need
no trained weights here. On a GPU it also says whether a step waits for the device. With --against,
other checkouts of compatible code run in the same alternation, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
UNGUIDED = ["DISTILLATION.ENABLE_INTER", "False", "DISTILLATION.OFFLINE", "False"]
ONLINE = ["DISTILLATION.OFFLINE", "False", "DISTILLATION.TEACHER_WEIGHTS", "None"]


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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"opts": args.opts, "results": results}, indent=1))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", nargs="+", required=True, help="guided configs")
    parser.add_argument("--against", nargs="*", default=[], help="other checkouts")
    parser.add_argument(
        "--sweep", nargs="+", default=[], metavar=("KEY", "VALUE"), help="a row for each value"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="in a block")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/throughput.json"))
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace, config: str, opts: list[str]) -> dict[str, dict[str, Any]]:
    """What each checkout measures, in blocks that alternate between them."""
    roots = [str(ROOT), *args.against]
    servers = {}
    for root in roots:
        script = Path(root).resolve() / "benchmarks/throughput.py"  # knows that checkout's modules
        command = [sys.executable, str(script), "--serve", "--cfg", str(Path(config).resolve())]
        command += ["--steps", str(args.steps), "--opts", *opts]
        environment = {**os.environ, "PYTHONPATH": str(Path(root).resolve())}
        servers[root] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    facts = {root: ask(server) for root, server in servers.items()}
    ways = {root: facts[root].pop("ways") for root in roots}
    seconds: dict[str, dict[str, list[float]]] = {
        root: {way: [] for way in ways[root]} for root in roots
    }
    for round_ in range(args.rounds + 1):
        for way in ways[roots[0]]:
            for root in roots:
                found = ask(servers[root], way)
                if round_ > 0:  # the first warms up
                    seconds[root][way].append(found)
    for server in servers.values():
        assert server.stdin is not None
        server.stdin.close()
        server.wait()
    return {root: summary(facts[root], seconds[root], args.steps) for root in roots}


def ask(server: subprocess.Popen, way: str | None = None) -> Any:
    """A server's next answer."""
    assert server.stdin is not None and server.stdout is not None
    if way is not None:
        server.stdin.write(way + "\n")
        server.stdin.flush()
    line = server.stdout.readline()
    if not line:
        sys.exit(server.wait() or 1)  # it has said why
    return json.loads(line)


def summary(facts: dict[str, Any], seconds: dict[str, list[float]], steps: int) -> dict[str, Any]:
    """Medians and quartiles in images/s, and ratios of blocks of the same round."""
    size = facts["batch_size"]
    rates = {w: [steps * size / s for s in found] for w, found in seconds.items()}
    ratios = {
        way: median(c / s for c, s in zip(seconds["ceiling"], found, strict=True))
        for way, found in seconds.items()
    }
    costs = {
        way: median(s / u for s, u in zip(seconds[way], seconds["unguided"], strict=True)) - 1
        for way in ("guided", "offline")
        if way in seconds
    }
    spread = {w: quantiles(r, n=4) for w, r in rates.items()}
    of_peak = facts["step_flops"] * spread["ceiling"][1] / facts["matrix_flops"]
    return {
        **facts,
        "n": len(seconds["ceiling"]),
        "images_per_second": {w: q[1] for w, q in spread.items()},
        "quartiles": {w: [q[0], q[2]] for w, q in spread.items()},
        "of_ceiling": ratios,
        "cost_over_unguided": costs,
        "ceiling_of_peak": of_peak,
    }


def row(result: dict[str, Any], *, header: bool) -> str:
    """A line of the table."""
    ways = ["ceiling", "loader", "unguided", "guided", "offline", "test"]
    lines = []
    if header:
        titles = "".join(f"{way:>17}" for way in ways)
        lines.append(f"{'images/s (of the ceiling)':<28}{titles}{'of peak':>9}  guidance costs")
    cells = ""
    for way in ways:
        rate, ratio = (result[k].get(way) for k in ("images_per_second", "of_ceiling"))
        text = f"{rate:.1f}" if rate else "-"
        cells += (
            f"{text + (f' ({ratio:.3f})' if rate and way not in ('ceiling', 'test') else ''):>17}"
        )
    costs = ", ".join(f"{w} {100 * c:+.1f} %" for w, c in result["cost_over_unguided"].items())
    name = result["name"] + ("" if result["checkout"] == str(ROOT) else " (other)")
    lines.append(f"{name:<28}{cells}{100 * result['ceiling_of_peak']:>8.1f}%  {costs}")
    if result["waits"]:
        lines.append(f"  a step waits for the device: {result['waits']}")
    return "\n".join(lines)


def serve(args: argparse.Namespace) -> None:
    """Measures blocks as they are asked for, in the checkout that PYTHONPATH names."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the code says goes to the error stream
    warnings.simplefilter("ignore")  # of guides without weights, which take as long

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")

    blocks, facts = prepare(args.cfg[0], args.opts, args.steps)
    answer({**facts, "ways": list(blocks)})
    for line in sys.stdin:
        answer(blocks[line.strip()]())


def prepare(
    config: str, opts: list[str], steps: int
) -> tuple[dict[str, Callable[[], float]], dict[str, Any]]:
    """Blocks of `steps` steps that return their seconds, and what they were measured on."""
    import torch

    import lg
    from lg import trainer
    from lg.device import synchronize
    from lg.distributed import World
    from lg.logs.log import RunLog
    from lg.tools.info import complexity

    runs = {}
    folder = tempfile.mkdtemp()
    kinds = {"unguided": UNGUIDED, "guided": ONLINE}
    if lg.load_config(config, opts).DISTILLATION.FEATURE_FILE:
        kinds["offline"] = ["DISTILLATION.OFFLINE", "True"]
    for kind, extra in kinds.items():
        cfg = lg.load_config(config, [*opts, *extra, "OUT_DIR", folder])
        data = lg.builders.fetch_data(cfg, World())
        runs[kind] = lg.builders.build_run(cfg, data, World(), RunLog(folder, enabled=False))
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

    fixed = next_batch(plain)

    def training(run: Any) -> Callable[[], float]:
        return lambda: timed(lambda: train_step(run, *next_batch(run)), run.loader.num_prefetched)

    def test() -> float:
        synchronize(device)
        started = time.perf_counter()
        model, count = plain.guided.student, min(2, len(plain.test_loader))
        result = trainer.evaluate(
            model,
            islice(plain.test_loader, count),  # type: ignore[arg-type]
            num_classes=plain.settings.num_classes,
            precision=plain.precision,
        )
        seconds = time.perf_counter() - started
        plain.module.train()
        return seconds * steps * plain.report.batch_size / result.count  # as for a block's images

    blocks = {
        "ceiling": lambda: timed(lambda: train_step(plain, *fixed)),
        "loader": lambda: timed(lambda: next_batch(plain), plain.loader.num_prefetched),
    }
    blocks |= {kind: training(run) for kind, run in runs.items()}
    blocks["test"] = test
    cfg = lg.load_config(config, opts)
    macs = complexity(plain.guided.student, cfg.MODEL.IMG_SIZE)["macs"]
    facts = {
        "batch_size": cfg.TRAIN.BATCH_SIZE,
        "image_size": cfg.MODEL.IMG_SIZE,
        "precision": str(plain.precision),
        "compile": cfg.TRAIN.COMPILE,
        "backend": type(plain.loader).__name__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "step_flops": 6 * macs,  # forward, and twice that backward
        "matrix_flops": matrix_rate(device, plain.precision.dtype or torch.float32),
        "waits": waits(blocks["guided"]) if device.type == "cuda" else "",
    }
    return blocks, facts


def next_batch(run: Any) -> tuple[Any, Any]:
    """What the training loop does before a step."""
    import numpy as np

    batch = next(run.loader).to(run.device)
    images, targets = run.mixing(batch.images, batch.labels, np.random.default_rng(0))
    return batch._replace(images=images), targets


def train_step(run: Any, batch: Any, targets: Any) -> None:
    """A step of the training loop."""
    from lg.step import accumulate_gradients, update_weights

    losses, hits = accumulate_gradients(run, batch, targets)
    update_weights(run)
    if run.average is not None:
        run.average.follow(run.guided.student, 0, warming=False)
    run.meter.add(losses, hits)


def matrix_rate(device: Any, dtype: Any) -> float:
    """Measured operations a second of a large matrix product."""
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
    return 2 * side**3 / min(seconds)  # the peak


def waits(block: Callable[[], float]) -> str:
    """The first place in which a warmed-up block waits for a GPU, if there is one."""
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
