#!/usr/bin/env python3
"""Compare the methods, one at a time: accuracy, gain with 95 % interval, and time.

    python benchmarks/methods.py                  # all methods on 300 real digits, 3 seeds
    python benchmarks/methods.py --methods mix gram --seeds 5
    python benchmarks/methods.py --guide configs/resnet/r-20_c100-tenth.yaml \\
        --cfg configs/deit/deit-1m_c100-tenth_ours.yaml
    python benchmarks/methods.py --steps --cfg configs/deit/deit-ti_flowers_ours.yaml --batch 4

Trains a guide for each seed, the plain and the guided transformer, and the guided one with each
method, in OUT/CONFIG_METHOD_sSEED. Each run is a `run_net.py` command. Finished runs are read
instead of repeated. Prints a Markdown table. With `--steps`, times single training steps instead,
alternating with those without the method; seconds of processor time, which hardly depend on what
else the machine does.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lg  # noqa: E402
from benchmarks.accuracy import compact, gains  # noqa: E402
from benchmarks.report import make_parser  # noqa: E402
from lg.device import reuse_memory  # noqa: E402
from lg.logs.log import read_run_lines  # noqa: E402

# Name of the run -> its title, and the settings that differ from the guided transformer. {wide}
# stands for twice its channels.
METHODS = {
    "plain": ("plain", "DISTILLATION.ENABLE_INTER False DISTILLATION.ENABLE_LOGIT False"),
    "guided": ("guided, as published", ""),
    "mix": ("`INTER_STUDENT_INDEX mix`", "DISTILLATION.INTER_STUDENT_INDEX mix"),
    "adaptive": ("`SCHEDULE adaptive`", "DISTILLATION.SCHEDULE adaptive"),
    "mix_adaptive": (
        "`INTER_STUDENT_INDEX mix`, `SCHEDULE adaptive`",
        "DISTILLATION.INTER_STUDENT_INDEX mix DISTILLATION.SCHEDULE adaptive",
    ),
    "decay_cosine": ("`SCHEDULE decay_cosine`", "DISTILLATION.SCHEDULE decay_cosine"),
    "gram": ("`INTER_TRANSFORM gram`", "DISTILLATION.INTER_TRANSFORM gram"),
    "logit": ("`ENABLE_LOGIT`", "DISTILLATION.ENABLE_LOGIT True"),
    "logit_standardize": (
        "`ENABLE_LOGIT`, `LOGIT_STANDARDIZE`",
        "DISTILLATION.ENABLE_LOGIT True DISTILLATION.LOGIT_STANDARDIZE True",
    ),
    "mimetic": ("`INIT mimetic`", "MODEL.INIT mimetic"),
    "mimetic_mix": (
        "`INIT mimetic`, `INTER_STUDENT_INDEX mix`",
        "MODEL.INIT mimetic DISTILLATION.INTER_STUDENT_INDEX mix",
    ),
    "muon": ("`OPTIMIZER muon`", "OPTIM.OPTIMIZER muon"),
    "nadamuon": ("`OPTIMIZER nadamuon`", "OPTIM.OPTIMIZER nadamuon"),
    "patch_drop": ("`PATCH_DROP 0.5`", "TRAIN.PATCH_DROP 0.5"),
    "wide_last": ("`WIDE_LAST`, twice the channels", "TRANSFORMER.WIDE_LAST {wide}"),
    "lift": ("`LIFT`, twice the channels", "TRANSFORMER.LIFT {wide}"),
}
TIMED = ("mix", "gram", "logit", "logit_standardize", "patch_drop", "wide_last", "lift")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--guide", default="configs/digits/r-8_digits.yaml", metavar="CFG")
    parser.add_argument("--cfg", default="configs/digits/vit_digits_ours.yaml", help="guided by it")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="of --cfg")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/methods"))
    parser.add_argument("--steps", action="store_true", help="time single steps instead")
    parser.add_argument("--batch", type=int, default=4, help="images per step (default 4)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each (default 9)")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}: set it to 2 or more")
    if args.steps:
        methods = [name for name in args.methods if name in TIMED]
        time_methods([args.cfg, *args.opts], methods, args.batch, args.rounds)
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ["guided", *args.methods]}
    for seed in range(1, args.seeds + 1):
        guide = args.out / f"{Path(args.guide).stem}_s{seed}"
        train(args.guide, [], seed, guide)
        for name, found in runs.items():
            options = method([args.cfg, *args.opts], name)
            options += ["DISTILLATION.TEACHER_WEIGHTS", str(guide.resolve() / "model.pyth")]
            folder = args.out / f"{Path(args.cfg).stem}_{name}_s{seed}"
            found.append(train(args.cfg, options, seed, folder))
    print(gains(runs["guided"], {METHODS[name][0]: found for name, found in runs.items()}))


def method(config: list[str], name: str) -> list[str]:
    """Return KEY VALUE ... of a config (path, KEY VALUE ...) with a method."""
    path, *opts = config
    wide = 2 * lg.load_config(path, opts).TRANSFORMER.HIDDEN_DIM
    return [*opts, *METHODS[name][1].format(wide=wide).split()]


def train(config: str, options: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Train one run unless it is finished; return what `accuracy.compact` keeps of it."""
    log = folder / "log.txt"
    if not is_finished(log):
        # Of a part of the images (TRAIN.FRACTION), each seed trains on another one.
        options = ["RNG_SEED", str(seed), "TRAIN.SPLIT_SEED", str(seed), *options]
        options += ["OUT_DIR", str(folder.resolve())]
        command = [sys.executable, "run_net.py", "--mode", "train", "--cfg", config, *options]
        command += ["LOG_PICTURES", "False"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    run = compact(read_run_lines(log))
    accuracy, minutes = 100 - run["tests"][-1]["top1_err"], 60 * run["hours"]
    print(f"{folder.name:<40} {accuracy:5.1f} %  {minutes:5.1f} min", flush=True)
    return run


def is_finished(log: Path) -> bool:
    """Return whether a run was tested after its last epoch."""
    lines = read_run_lines(log) if log.is_file() else []
    tests = [line["epoch"] for line in lines if line["_type"] == "test_epoch"]
    return bool(tests) and len(set(tests[-1].split("/"))) == 1


def time_methods(config: list[str], methods: list[str], batch: int, rounds: int) -> None:
    """Print the time of a step with each method beside that of the step without it, one thread."""
    torch.set_num_threads(1)
    reuse_memory()
    print("| | without, ms | with, ms | ratio (quartiles) |\n| --- | --- | --- | --- |")
    for name in methods:
        steps = [make_step(config, "guided", batch), make_step(config, name, batch)]
        times: list[list[float]] = [[], []]
        for number in range(rounds + 1):
            for which in (0, 1) if number % 2 else (1, 0):
                started = time.process_time()
                steps[which]()
                times[which].append(1000 * (time.process_time() - started))
        # The first round warms up.
        without, with_it = times[0][1:], times[1][1:]
        ratios = [b / a for a, b in zip(without, with_it, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = f"{statistics.median(without):.0f} | {statistics.median(with_it):.0f}"
        print(f"| {METHODS[name][0]} | {row} | {middle:.3f} ({low:.3f}-{high:.3f}) |", flush=True)


def make_step(config: list[str], name: str, batch: int) -> Callable[[], None]:
    """Return a function that takes one training step on a fixed batch, with an untrained guide.

    Args:
        config: The path, and KEY VALUE ...
        name: The method.
        batch: Images.
    """
    options = [*method(config, name), "DISTILLATION.TEACHER_WEIGHTS", "null"]
    cfg = lg.load_config(config[0], options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the guide has random weights
        guided, guide, loss = lg.build_guided(cfg)
    optimizer = torch.optim.AdamW(guided.train().parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, cfg.MODEL.IMG_SIZE, cfg.MODEL.IMG_SIZE)
    targets = torch.eye(cfg.MODEL.NUM_CLASSES)[torch.arange(batch) % cfg.MODEL.NUM_CLASSES]

    def step() -> None:
        logits, maps = guided(images)
        loss(logits, maps, targets, *guide(images))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
