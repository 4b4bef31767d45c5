#!/usr/bin/env python3
"""Compare the methods on 300 real digits, one at a time: accuracy, 95 % interval and time.

    python benchmarks/methods.py                          # all methods, 3 seeds
    python benchmarks/methods.py --methods mix gram --seeds 5
    python benchmarks/methods.py --steps configs/deit/deit-ti_flowers_ours.yaml --batch 4

Trains a guide, the plain and the guided transformer for each seed, and the guided one with each
method. Each run is a `run_net.py` command. Finished runs are read instead of repeated. With
`--steps`, times single training steps of another guided config instead, alternating with those
without the method; seconds of processor time, which hardly depend on what else the machine does.
Prints a Markdown table.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lg  # noqa: E402
from benchmarks.report import make_parser  # noqa: E402
from lg.device import reuse_memory  # noqa: E402
from lg.logs.log import read_json_lines  # noqa: E402

# Name of the run -> its title, and the settings that differ from the guided transformer. {wide}
# stands for twice its channels.
METHODS = {
    "plain": ("plain", ""),
    "guided": ("guided, as published", ""),
    "mix": ("`INTER_STUDENT_INDEX mix`", "DISTILLATION.INTER_STUDENT_INDEX mix"),
    "adaptive": ("`SCHEDULE adaptive`", "DISTILLATION.SCHEDULE adaptive"),
    "mix_adaptive": (
        "both",
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
    parser.add_argument("--out", type=Path, default=Path("work_dirs/methods"))
    parser.add_argument("--steps", metavar="CFG", help="time steps of this guided config instead")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="of that config")
    parser.add_argument("--batch", type=int, default=4, help="images per step (default 4)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each (default 9)")
    args = parser.parse_args()
    if args.steps:
        methods = [name for name in args.methods if name in TIMED]
        time_methods([args.steps, *args.opts], methods, args.batch, args.rounds)
        return
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in args.methods}
    for seed in range(1, args.seeds + 1):
        train("guide", "r-8_digits", "", seed=seed, out=args.out)
        for name in args.methods:
            config = "vit_digits_base" if name == "plain" else "vit_digits_ours"
            runs[name].append(train(name, config, METHODS[name][1], seed=seed, out=args.out))
    print(table(runs))


def train(name: str, config: str, settings: str, *, seed: int, out: Path) -> tuple[float, float]:
    """Train one run; return its final test accuracy (%) and the training time (s)."""
    folder = (out / f"seed{seed}").resolve()
    options = [
        *settings.format(wide=192).split(),
        "OUT_DIR",
        str(folder / name),
        "RNG_SEED",
        str(seed),
    ]
    if config == "vit_digits_ours":
        options += ["DISTILLATION.TEACHER_WEIGHTS", str(folder / "guide" / "model.pyth")]
    command = ["run_net.py", "--mode", "train", "--cfg", f"configs/digits/{config}.yaml", *options]
    log = folder / name / "log.txt"
    if not log.is_file() or result(log) is None:
        subprocess.run(
            [sys.executable, *command, "DEVICE", "cpu", "LOG_PICTURES", "False"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    found = result(log)
    assert found is not None, f"{log} has no test of the last epoch"
    print(f"seed {seed}  {name:<18} {found[0]:5.1f} %  {found[1]:5.1f} s", flush=True)
    return found


def result(log: Path) -> tuple[float, float] | None:
    """Return accuracy (%) of the last epoch and training time (s); None if it is not tested."""
    lines = read_json_lines(log)
    tests = [line for line in lines if line["_type"] == "test_epoch"]
    if not tests or len(set(tests[-1]["epoch"].split("/"))) > 1:
        return None
    # An epoch that is repeated after a crash counts once.
    epochs = {line["epoch"]: line["time_epoch"] for line in lines if line["_type"] == "train_epoch"}
    return 100 - float(tests[-1]["top1_err"]), float(sum(epochs.values()))


def table(runs: dict[str, list[tuple[float, float]]]) -> str:
    """Return a Markdown table: mean and half the 95 % interval (Student t), gain and time."""
    rows = ["| | top-1, % | gain | seconds a run |", "| --- | --- | --- | --- |"]
    reference = runs.get("guided", [])
    for name, found in runs.items():
        pairs = zip(found, reference, strict=False)
        gain = interval([a[0] - b[0] for a, b in pairs]) if name != "guided" else ""
        seconds = statistics.median(time for _, time in found)
        rows.append(
            f"| {METHODS[name][0]} | {interval([a for a, _ in found])} | {gain} | {seconds:.0f} |"
        )
    return "\n".join(rows)


def time_methods(config: list[str], methods: list[str], batch: int, rounds: int) -> None:
    """Print the time of a step with each method beside that of the step without it, one thread."""
    torch.set_num_threads(1)
    reuse_memory()
    print("| | without, ms | with, ms | ratio (quartiles) |\n| --- | --- | --- | --- |")
    for name in methods:
        steps = [make_step(config, "", batch), make_step(config, METHODS[name][1], batch)]
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


def make_step(config: list[str], settings: str, batch: int) -> Callable[[], None]:
    """Return a function that takes one training step on a fixed batch, with an untrained guide.

    Args:
        config: The path, and KEY VALUE ...
        settings: KEY VALUE ... of the method.
        batch: Images.
    """
    path, *opts = config
    wide = 2 * lg.load_config(path, opts).TRANSFORMER.HIDDEN_DIM
    options = [*opts, *settings.format(wide=wide).split(), "DISTILLATION.TEACHER_WEIGHTS", "null"]
    cfg = lg.load_config(path, options)
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


def interval(values: list[float]) -> str:
    """Return mean ± half the 95 % interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {stats.t.ppf(0.975, len(values) - 1) * error:.1f}"


if __name__ == "__main__":
    main()
