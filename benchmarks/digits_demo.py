#!/usr/bin/env python3
"""Measure what guidance gains on 300 real digits: train guide, plain and guided transformer.

    python benchmarks/digits_demo.py              # one seed, under 3 minutes on two cores
    python benchmarks/digits_demo.py --seeds 3    # mean and 95 % interval of three seeds
    python benchmarks/digits_demo.py --offline    # with offline guidance as well

Each training run is a `run_net.py` command, printed before it starts. Finished runs are read
instead of repeated. Print a table; write curves.png and results.json next to the runs.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import make_parser, write_json  # noqa: E402
from lg.logs.log import read_run_lines  # noqa: E402
from lg.tools.intervals import mean_interval  # noqa: E402

MODELS = {
    "r-8_digits": "ResNet-8, the guide",
    "vit_digits_base": "transformer, plain",
    "vit_digits_ours": "transformer, guided",
}
OFFLINE = {"vit_digits_ours_offline": "the same, offline"}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default 1)")
    parser.add_argument("--offline", action="store_true", help="add offline guidance")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/digits_demo"))
    args = parser.parse_args()
    if args.offline:
        MODELS.update(OFFLINE)
    started = time.perf_counter()
    runs = {
        seed: {name: train(name, seed=seed, out=args.out) for name in MODELS}
        for seed in range(1, args.seeds + 1)
    }
    seconds = time.perf_counter() - started
    print(table(runs))
    args.out.mkdir(parents=True, exist_ok=True)
    plot(runs, args.out / "curves.png")
    write_json(args.out / "results.json", seconds=seconds, runs=runs)
    print(
        f"\nCurves: {args.out / 'curves.png'}; numbers: {args.out / 'results.json'}. "
        f"Took {seconds:.0f} s."
    )


def train(name: str, *, seed: int, out: Path) -> dict[str, Any]:
    """Train one config and return its size and its test accuracies from the log."""
    folder = (out / f"seed{seed}").resolve()
    guide = str(folder / "r-8_digits" / "model.pyth")
    settings = ["OUT_DIR", str(folder / name), "RNG_SEED", str(seed), "DEVICE", "cpu"]
    settings += ["TRAIN.SPLIT_SEED", str(seed)]  # other digits with each seed
    config = ["--cfg", f"configs/digits/{name}.yaml"]
    if name.startswith("vit_digits_ours"):
        settings += ["DISTILLATION.TEACHER_WEIGHTS", guide]
    if name in OFFLINE:
        settings += ["DISTILLATION.FEATURE_FILE", str(folder / "features")]
        run(["precompute_feature.py", *config, "--shifts", "5", *settings])
    print(run(["run_net.py", "--mode", "train", *config, *settings]), flush=True)
    lines = read_run_lines(folder / name / "log.txt")
    tests = [line for line in lines if line["_type"] == "test_epoch"]
    return {
        "params": next(line["params"] for line in lines if line["_type"] == "complexity"),
        "epochs": [int(line["epoch"].split("/")[0]) for line in tests],
        "accuracy": [100 - line["top1_err"] for line in tests],
    }


def run(command: list[str]) -> str:
    """Print and run a command of this project; return the last line of its output."""
    shown = " ".join(os.path.relpath(c) if c.startswith("/") else c for c in command)
    print(f"$ python {shown}", flush=True)
    process = subprocess.run(
        [sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    if process.returncode:
        sys.exit(process.returncode)
    return process.stdout.strip().splitlines()[-1]


def table(runs: dict[int, dict[str, Any]]) -> str:
    """Format parameters and final test accuracy (mean ± half its 95 % interval) of each model."""
    rows = [f"\n{'':<22}{'parameters':>12}{'top-1 on 597 test digits':>28}"]
    for name, title in MODELS.items():
        final = [run[name]["accuracy"][-1] for run in runs.values()]
        mean, half = mean_interval(final)
        spread = "" if half is None else f" ± {half:.1f}"
        params = next(iter(runs.values()))[name]["params"]
        rows.append(f"{title:<22}{params:>12,}{f'{mean:.1f}{spread} %':>28}")
    gains = [
        r["vit_digits_ours"]["accuracy"][-1] - r["vit_digits_base"]["accuracy"][-1]
        for r in runs.values()
    ]
    count = f"mean of {len(gains)} seeds, each: {', '.join(f'{g:.1f}' for g in gains)}"
    rows.append(
        f"\nGuidance gains {statistics.mean(gains):.1f} points"
        f"{f' ({count})' if len(gains) > 1 else ''}."
    )
    return "\n".join(rows)


def plot(runs: dict[int, dict[str, Any]], path: Path) -> None:
    """Plot test accuracy over the epochs, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    colors = dict(zip(MODELS, ("tab:gray", "tab:orange", "tab:blue", "tab:green"), strict=False))
    for run in runs.values():
        for name, title in MODELS.items():
            axes.plot(run[name]["epochs"], run[name]["accuracy"], color=colors[name], label=title)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="lower right")
    axes.set(
        xlabel="epoch",
        ylabel="top-1 accuracy on the test split, %",
        ylim=(0, 100),
        title="300 training digits, 16 x 16 pixels",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted. Repeat the command to resume.")
