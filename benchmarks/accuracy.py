#!/usr/bin/env python3
"""Write the accuracy tables of docs/results.md from the logs of the runs, never by hand.

python benchmarks/accuracy.py --add work_dirs/pvtv2-b0_flowers_ours
python benchmarks/accuracy.py            # write the tables
python benchmarks/accuracy.py --check    # exit with 1 if the tables differ from the logs

`--add` keeps what a table needs of a run's log in docs/evidence/RUN/run.json: settings that
differ from the defaults, tests, parameters, hours, commit, hardware and version of torch.
docs/evidence/tables.yaml lists the rows of each table and the runs of each row; a row with `minus`
is the difference from those runs, seed by seed.
A table stands in docs/results.md between `<!-- table NAME -->` and `<!-- end NAME -->`. An entry
with `reference` and `rows` shows what each row gains over the reference. One with `images` and
`series` is a learning curve: a table of top-1 over the number of training images, plotted as
docs/NAME.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.report import make_parser, markdown
from lg.config.defaults import DEFAULT_VALUES, flatten
from lg.logs.log import epoch_seconds, read_run_lines
from lg.logs.plots import draw_lines, save_figure
from lg.tools.intervals import mean_interval

ROOT = Path(__file__).resolve().parent.parent
EVIDENCE = ROOT / "docs" / "evidence"
RESULTS = ROOT / "docs" / "results.md"
_KEPT = ("epoch", "split", "top1_err", "top5_err", "balanced_acc", "macro_f1", "calibration_err")
_PLACES = ("OUT_DIR", "DOWNLOAD_CACHE", "DATA_LOADER.ROOT")  # paths of one machine


def compact(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings (as last resumed), tests, size and hours of a run."""
    settings = [line for line in stats if line["_type"] == "cfg"][-1]
    changed = {
        key: Path(value).name if key.endswith("WEIGHTS") and value else value
        for key, value in sorted(flatten(settings))
        if key != "_type" and key not in _PLACES and value != DEFAULT_VALUES.get(key)
    }
    epochs, tests = (
        [line for line in stats if line["_type"] == kind] for kind in ("train_epoch", "test_epoch")
    )
    size = next(line for line in stats if line["_type"] == "complexity")
    return {
        "settings": changed,
        "parameters": size["params"],
        "macs": size["macs"],
        "epochs": f"{len(epochs)}/{settings['OPTIM']['MAX_EPOCH']}",
        "hours": round(epoch_seconds(stats) / 3600, 4),
        "tests": [{key: test[key] for key in _KEPT if key in test} for test in tests],
    }


def add(folder: Path) -> None:
    """Write docs/evidence/RUN/run.json from the log of a run."""
    lines = read_run_lines(str(folder / "log.txt"))
    machines = [line for line in lines if line["_type"] == "machine"]
    if not machines:
        sys.exit(f"{folder}/log.txt does not name the machine: train with VERBOSE True.")
    facts = machines[-1]
    run = compact(lines) | {
        "commit": facts["commit"][:7],
        "machine": facts["hardware"],
        "torch": facts["torch"],
    }
    target = EVIDENCE / folder.resolve().name / "run.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    print(f"{target.relative_to(ROOT)}: {run['epochs']} epochs, {run['hours']} h")


def spread(values: list[float]) -> str:
    """Return a mean and, of several values, half the width of its 95 % interval (Student t)."""
    mean, half = mean_interval(values)
    return f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"


def row(label: str, runs: list[dict[str, Any]]) -> list[str]:
    """Return the cells of a row: the last test of each run, as mean and interval."""
    tests = [run["tests"][-1] for run in runs]
    epochs = {run["epochs"] for run in runs}
    ended = all(len(set(text.split("/"))) == 1 for text in epochs)
    at = sorted({test["epoch"].split("/")[0] for test in tests}, key=int)

    def mean(key: str) -> str:
        return spread([test[key] for test in tests]) if all(key in test for test in tests) else ""

    return [
        label,
        f"{runs[0]['parameters'] / 1e6:.2f} M",
        f"{runs[0]['macs'] / 1e9:.2f}",
        " and ".join(at) if ended else f"{' and '.join(at)} (of {runs[0]['epochs'].split('/')[1]})",
        f"{len(runs)}",
        spread(top1(runs)),
        mean("macro_f1"),
        mean("calibration_err"),
        f"{sum(run['hours'] for run in runs) / len(runs):.1f}",
    ]


def difference(label: str, runs: list[str], minus: list[str]) -> list[str]:
    """Return the cells of a row: top-1 of runs minus top-1 of others with the same seeds."""
    return [label, "", "", "", f"{len(runs)}", gain(load(runs), load(minus)), "", "", ""]


def gain(runs: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    """Return the difference in top-1 of runs from others with the same seeds, with its sign."""
    pairs = zip(top1(runs), top1(reference), strict=True)
    change = spread([ours - theirs for ours, theirs in pairs])
    return change if change.startswith("-") else f"+{change}"


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of `{"label": ..., "runs": [...]}` rows, some with `"minus"`."""
    head = ["", "parameters", "GMACs", "epochs", "seeds", "top-1, %", "macro-F1"]
    head += ["calibration error", "hours a run"]
    lines = []
    for entry in rows:
        if "minus" in entry:
            lines.append(difference(**entry))
        else:
            lines.append(row(entry["label"], load(entry["runs"])))
    return "\n".join(markdown(head, lines))


def gains(
    reference: list[dict[str, Any]], rows: dict[str, list[dict[str, Any]]], *, timed: bool = True
) -> str:
    """Return a Markdown table: top-1, gain over the reference seed by seed, and time of a run.

    Without `timed`, the table has no times, because the machine did other work as well.
    """
    lines = []
    for label, runs in rows.items():
        gained = "" if runs == reference else gain(runs, reference[: len(runs)])
        seconds = f"{3600 * median(run['hours'] for run in runs):.0f}"
        lines.append([label, f"{len(runs)}", spread(top1(runs)), gained, seconds])
    head = ["", "seeds", "top-1, %", "gain", "seconds a run"]
    head, *lines = (line if timed else line[:-1] for line in (head, *lines))
    return "\n".join(markdown(head, lines))


def load(names: list[str]) -> list[dict[str, Any]]:
    """Return what is kept of some runs."""
    return [json.loads((EVIDENCE / name / "run.json").read_text()) for name in names]


def top1(runs: list[dict[str, Any]]) -> list[float]:
    """Return the top-1 accuracy of runs in their last test, in percent."""
    return [100 - run["tests"][-1]["top1_err"] for run in runs]


def curve_table(entry: dict[str, Any]) -> str:
    """Return a learning curve as a Markdown table: a row per series, a column per set size."""
    head = ["top-1, %, of training images:", *(f"{count:,}" for count in entry["images"])]
    lines = []
    for label, points in entry["series"].items():
        lines.append([label, *(spread(top1(load(names))) for names in points)])
    return "\n".join(markdown(head, lines))


def draw_curve(figure: Any, entry: dict[str, Any]) -> None:
    """Draw a learning curve."""
    axes = figure.subplots()
    series = {
        label: (entry["images"], [fmean(top1(load(names))) for names in points])
        for label, points in entry["series"].items()
    }
    draw_lines(axes, series, title="top-1 on the test set, %", xlabel="training images")
    axes.set_xscale("log")
    axes.set_xticks(entry["images"], [f"{count:,}" for count in entry["images"]], minor=False)
    axes.set_xticks([], minor=True)


def render(entry: list[dict[str, Any]] | dict[str, Any]) -> str:
    """Return an entry of tables.yaml as a Markdown table."""
    if isinstance(entry, list):
        return table(entry)
    if "reference" in entry:
        rows = {label: load(names) for label, names in entry["rows"].items()}
        return gains(load(entry["reference"]), rows, timed=entry.get("timed", True))
    return curve_table(entry)


def fill(text: str, tables: dict[str, Any]) -> str:
    """Return a page with each table between its two marks replaced.

    Raises:
        ValueError: The page lacks the marks of a table.
    """
    for name, rows in tables.items():
        start, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"docs/results.md lacks the marks of table {name!r}.")
        text = before + start + render(rows) + "\n" + end + after
    return text


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--add", nargs="+", default=[], metavar="OUT_DIR", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for folder in args.add:
        add(folder)
    tables = yaml.safe_load((EVIDENCE / "tables.yaml").read_text(encoding="utf-8"))
    page = RESULTS.read_text(encoding="utf-8")
    filled = fill(page, tables)
    if args.check and filled != page:
        sys.exit("docs/results.md differs from docs/evidence: run python benchmarks/accuracy.py")
    if filled != page:
        RESULTS.write_text(filled, encoding="utf-8")
    curves = {name: entry for name, entry in tables.items() if "series" in entry}
    if not args.check:
        for name, entry in curves.items():
            with (ROOT / "docs" / f"{name}.png").open("wb") as stream:
                save_figure(stream, 6, 3.6, draw_curve, entry, format="png", dpi=110)


if __name__ == "__main__":
    main()
