#!/usr/bin/env python3
"""Correctness, speed and accuracy on a GPU, in three parts of at most 8.5 minutes.

python benchmarks/gpu.py correctness     # pytest -m gpu, one result per test
python benchmarks/gpu.py speed           # all families: eager, compiled, CUDA graphs
python benchmarks/gpu.py accuracy        # Flowers, then CIFAR-100: guide, guided and plain DeiT-Ti
python benchmarks/gpu.py correctness --device cpu --quick    # try a part without a GPU

Repeating a command skips the cases that have finished and tries the failed ones again. Training
resumes exactly, so each part can be continued until it is complete. Results are files below --out,
one per case; every part ends by writing table.md with all results so far. Needs the packages of
requirements.txt and, for `correctness`, pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.accuracy import compact  # noqa: E402
from benchmarks.report import TRANSFORMERS, config_path, make_parser, markdown  # noqa: E402
from lg.files.atomic import write_text  # noqa: E402
from lg.logs.log import read_run_lines  # noqa: E402

MODES = ("none", "default", "reduce-overhead")  # of TRAIN.COMPILE
_FINAL = ("done", "passed", "skipped")  # outcomes that are not tried again
GOAL = "goal: 10,000 images/s for deit-ti, guided, 224 pixels, batch 128"


class Cases:
    """Runs the cases of a part that have no result yet, as long as there is time."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.end = folder, time.monotonic() + 60 * minutes

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def is_done(self, name: str) -> bool:
        path = self._path(name)
        return path.exists() and json.loads(path.read_text())["outcome"] in _FINAL

    def save(self, name: str, **result: Any) -> None:
        text = json.dumps({"case": name, **result}, indent=1, default=float)
        write_text(self._path(name), text)
        print(f"{name}: {result.get('outcome', 'done')}", flush=True)

    def run(self, name: str, case: Callable[[float], dict[str, Any]], needs: float) -> None:
        """Run a case unless it is done, or fewer seconds than it needs are left."""
        if self.is_done(name):
            return
        if self.seconds_left() < needs:
            print(f"{name}: no time left, repeat the command", flush=True)
            return
        self.save(name, **case(self.seconds_left()))

    def _path(self, name: str) -> Path:
        return self.folder / f"{''.join(c if c.isalnum() or c in '-_' else '.' for c in name)}.json"


class KeepResults:
    """A pytest plugin that keeps the outcome of each test and skips the kept ones."""

    def __init__(self, cases: Cases) -> None:
        self.cases = cases

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if not self.cases.is_done(item.name)]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            if report.when == "teardown" and self.cases.is_done(report.location[2]):
                return
            reason = "" if report.passed else str(report.longrepr).splitlines()[-1][:300]
            self.cases.save(
                report.location[2],
                outcome=report.outcome,
                seconds=round(report.duration, 1),
                reason=reason,
            )

    def pytest_runtest_setup(self) -> None:
        if self.cases.seconds_left() < 60:
            import pytest

            pytest.exit("no time left, repeat the command")


def correctness(cases: Cases, args: argparse.Namespace) -> None:
    """Run `pytest -m gpu`."""
    import pytest

    os.environ["LG_TEST_DEVICE"] = args.device
    os.chdir(ROOT)
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    if args.quick:
        options += ["-k", "time_mode or one_process or never_waits"]
    pytest.main(options, plugins=[KeepResults(cases)])


def speed(cases: Cases, args: argparse.Namespace) -> None:
    """Measure images/s of every family in every mode, and the kernels of its step."""
    configs = {name: config_path(name, "c100", "ours") for name in TRANSFORMERS}
    modes = MODES[:1] if args.quick else MODES
    if args.quick:
        configs = {"vit-digits": ROOT / "configs/digits/vit_digits_ours.yaml"}
    for mode in modes:
        for name, config in configs.items():
            path = str(config)
            opts = ["DEVICE", args.device, "TRAIN.COMPILE", mode]
            if args.device == "cuda":
                opts += ["TRAIN.MIXED_PRECISION", "True", "CUDNN.BENCHMARK", "True"]
            cases.run(
                f"{name} {mode}", lambda left, p=path, o=opts: throughput(p, o, left, args), 45
            )
            if mode == "none":
                cases.run(f"{name} profile", lambda left, p=path, o=opts: profile(p, o, left), 30)


def throughput(config: str, opts: list[str], left: float, args: argparse.Namespace) -> dict:
    """Run benchmarks/throughput.py, and return the median images/s of each part."""
    out = args.out / "throughput.json"
    rounds = ["--rounds", "2", "--steps", "1"] if args.quick else ["--rounds", "5", "--steps", "10"]
    command = [sys.executable, str(ROOT / "benchmarks/throughput.py"), "--cfg", config]
    done = call([*command, *rounds, "--out", str(out), "--opts", *opts], left)
    if done["outcome"] != "done":
        return done
    (result,) = json.loads(out.read_text())["results"]
    return done | {key: result[key] for key in ("images_per_second", "of_ceiling", "batch_size")}


def profile(config: str, opts: list[str], left: float) -> dict:
    """Profile steps in a process of its own; see `profile_steps`."""
    command = [sys.executable, str(Path(__file__)), "profile", "--cfg", config, "--opts", *opts]
    done = call(command, left)
    return done | (json.loads(done["last"]) if done["outcome"] == "done" else {})


def profile_steps(config: str, opts: list[str], num_steps: int = 3) -> None:
    """Print, as JSON, kernels and time per guided step of random images, and the guide's share."""
    import torch
    from torch.profiler import ProfilerActivity

    import lg
    from lg import builders
    from lg.device import synchronize
    from lg.distributed import World

    cfg = lg.load_config(config, [*opts, "DISTILLATION.TEACHER_WEIGHTS", "null"])
    device = builders.build_device(cfg, World())
    guided, guide, loss = builders.build_guided(cfg)
    guided.to(device).train()
    guide.to(device)
    optimizer = builders.build_optimizer(cfg, guided)
    precision = builders.build_precision(cfg, device)
    size, count = cfg.MODEL.IMG_SIZE, cfg.TRAIN.BATCH_SIZE
    images = torch.randn(count, 3, size, size, device=device)
    targets = torch.full((count, cfg.MODEL.NUM_CLASSES), 1 / cfg.MODEL.NUM_CLASSES, device=device)

    def look() -> Any:
        with torch.no_grad(), precision.autocast():
            return guide(images, None, None)

    def step() -> None:
        maps, logits = look()
        with precision.autocast():
            outputs, own = guided(images)
        terms = loss(outputs, own, targets, maps, logits)
        precision.scaler.scale(terms["loss"]).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def seconds(function: Callable[[], Any]) -> float:
        function()
        synchronize(device)
        started = time.perf_counter()
        for _ in range(num_steps):
            function()
        synchronize(device)
        return (time.perf_counter() - started) / num_steps

    whole, part = seconds(step), seconds(look)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as record:
        step()
        synchronize(device)
    events = list(record.events())
    kernels = [e for e in events if str(e.device_type).endswith("CUDA")] if on_gpu else events
    busy = sum(e.time_range.elapsed_us() for e in kernels) / 1e6 if on_gpu else 0.0
    found = {
        "step_ms": 1e3 * whole,
        "guide_share": part / whole,
        "launches": len(kernels),
        "busy_share": busy / whole if on_gpu else None,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
    }
    print(json.dumps(found))


def accuracy(cases: Cases, args: argparse.Namespace) -> None:
    """Train guide, guided and plain DeiT-Ti as far as there is time; resumes where it stopped."""
    data = {"flowers": "flowers", "c100": "cifar-100-python"}
    runs = [
        (f"{config}_{name}{suffix}", folder)
        for name, folder in data.items()
        for config, suffix in (
            ("resnet/r-56", ""),
            ("deit/deit-ti", "_ours"),
            ("deit/deit-ti", "_base"),
        )
    ]
    opts: list[str] = ["TEST.PERIOD", "10"]
    if args.device == "cuda":
        opts += ["TRAIN.MIXED_PRECISION", "True", "TRAIN.COMPILE", "default"]
    if args.quick:
        runs = [("digits/r-8_digits", ""), ("digits/vit_digits_ours", "")]
        opts = ["OPTIM.MAX_EPOCH", "2", "OPTIM.WARMUP_EPOCHS", "0"]
    for config, folder in runs:
        if folder and not (Path(args.data) / folder).exists():
            print(f"{config}: {Path(args.data) / folder} is missing", flush=True)
            continue
        name = Path(config).name
        out = args.out / "runs" / name
        guide = f"r-56_{name.split('_')[1]}" if "deit" in name else "r-8_digits"
        more = ["OUT_DIR", str(out), "DEVICE", args.device, "DATA_LOADER.ROOT", args.data]
        if name.endswith("_ours"):
            more += ["DISTILLATION.TEACHER_WEIGHTS", str(args.out / f"runs/{guide}/model.pyth")]
        path = str(ROOT / f"configs/{config}.yaml")
        command = [sys.executable, str(ROOT / "run_net.py"), "--mode", "train", "--cfg", path]
        cases.run(name, lambda left, c=[*command, *opts, *more], o=out: train(c, o, left), 60)


def train(command: list[str], out: Path, left: float) -> dict[str, Any]:
    """Train until the end or the time is over; an unfinished run ends the part without a result."""
    done = call(command, left - 30)
    if done["outcome"] == "stopped":
        sys.exit(f"{out.name} is unfinished: repeat the command to resume it.")
    facts = compact(read_run_lines(out / "log.txt")) if done["outcome"] == "done" else {}
    return done | facts


def call(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a command for at most some seconds; SIGTERM then lets a training save.

    Returns:
        `outcome` (done, failed or stopped), `seconds`, `last`: the last line of output, or of the
        errors of a failure.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    stopped = False
    try:
        out, err = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGTERM)
        try:
            out, err = process.communicate(timeout=25)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
    outcome = "stopped" if stopped else "failed" if process.returncode else "done"
    lines = (err if outcome == "failed" else out).strip().splitlines() or [""]
    return {
        "outcome": outcome,
        "seconds": round(time.monotonic() - started, 1),
        "last": lines[-1][:500],
    }


def write_table(out: Path) -> None:
    """Write table.md from the results of all parts."""
    import torch

    from lg.device import machine_facts

    facts = machine_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [
        f"{facts['hardware']}, torch {facts['torch']}, {os.cpu_count()} cores in all. {GOAL}.",
        "",
    ]
    for part in PARTS:
        results = [json.loads(file.read_text()) for file in sorted((out / part).glob("*.json"))]
        if results:
            lines += [f"## {part.capitalize()}", "", *_ROWS[part](results), ""]
    text = "\n".join(lines)
    write_text(out / "table.md", text)
    print(f"\n{text}\nWritten to {out / 'table.md'}.")


def correctness_rows(results: list[dict]) -> list[str]:
    rows = [
        [each["case"], each["outcome"], f"{each['seconds']}", each["reason"]] for each in results
    ]
    return markdown(["test", "outcome", "seconds", "reason"], rows)


def speed_rows(results: list[dict]) -> list[str]:
    """One table of throughput, and one of profiles."""
    ways = ("ceiling", "loader", "unguided", "guided", "test")
    fast = [
        [
            each["case"],
            *(f"{each['images_per_second'].get(way, 0):,.0f}" for way in ways),
        ]
        for each in results
        if "images_per_second" in each
    ]
    facts = ("step_ms", "guide_share", "launches", "busy_share", "peak_mib")
    profiles = [
        [each["case"], *("" if each[f] is None else f"{each[f]:,.3g}" for f in facts)]
        for each in results
        if "launches" in each
    ]
    failed = [f"{each['case']}: {each['last']}" for each in results if each["outcome"] != "done"]
    return [
        *markdown(["images/s", *ways], fast),
        "",
        *markdown(["eager step", *facts], profiles),
        *(["", *failed] if failed else []),
    ]


def accuracy_rows(results: list[dict]) -> list[str]:
    rows = [
        [
            each["case"],
            each.get("epochs", each["outcome"]),
            f"{100 - each['tests'][-1]['top1_err']:.2f}" if each.get("tests") else each["last"],
            f"{each.get('hours', 0):.2f}",
        ]
        for each in results
    ]
    return markdown(["run", "epochs", "last top-1, %", "hours"], rows)


PARTS = {"correctness": correctness, "speed": speed, "accuracy": accuracy}
_ROWS = {"correctness": correctness_rows, "speed": speed_rows, "accuracy": accuracy_rows}


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("part", choices=[*PARTS, "table", "profile"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--data", default="data", help="folder of the data sets (accuracy)")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/gpu"))
    parser.add_argument("--cfg", help=argparse.SUPPRESS)
    parser.add_argument("--opts", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "profile":
        profile_steps(args.cfg, args.opts)
        return
    if args.part in PARTS and args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("No GPU found. To try the script without one, add --device cpu --quick.")
    args.out, args.data = args.out.resolve(), str(Path(args.data).resolve())
    try:
        if args.part != "table":
            PARTS[args.part](Cases(args.out / args.part, args.minutes), args)
    finally:
        write_table(args.out)


if __name__ == "__main__":
    main()
