#!/usr/bin/env python3
"""Compare the methods on 300 real digits, one at a time: accuracy, 95 % interval and time.

    python benchmarks/methods.py                          # all methods, 3 seeds
    python benchmarks/methods.py --methods mix gram --seeds 5

Trains a guide, the plain and the guided transformer for each seed, and the guided one with each
method. Each run is a `run_net.py` command. Finished runs are read instead of repeated. Prints a
Markdown table.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from pathlib import Path

from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import make_parser  # noqa: E402
from lg.logs.log import read_json_lines  # noqa: E402

# Name of the run -> its title, and the settings that differ from the guided transformer.
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
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/methods"))
    args = parser.parse_args()
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
    options = [*settings.split(), "OUT_DIR", str(folder / name), "RNG_SEED", str(seed)]
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


def interval(values: list[float]) -> str:
    """Return mean ± half the 95 % interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {stats.t.ppf(0.975, len(values) - 1) * error:.1f}"


if __name__ == "__main__":
    main()
