"""The first parts of the page: cards, differences of the runs, curves, cost and settings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape

from lg.logs.log import format_time
from lg.tools.intervals import wilson_interval
from lg.tools.report import figures, page, results
from lg.tools.report.runs import RunRecord, changed_settings, own_settings
from lg.tools.report.subject import Subject

_PANELS = (  # title, group of the log, key
    ("Loss, total", "training", "loss"),
    ("Loss, classification", "training", "cls_loss"),
    ("Loss, feature imitation", "training", "inter_distill_loss"),
    ("Loss, logit imitation", "training", "logit_distill_loss"),
    ("Top-1 accuracy, training images, %", "training", "top1_err"),
    ("Top-1 accuracy, images tested during training, %", "tests", "top1_err"),
    ("Top-1 accuracy of the weight average, the same images, %", "average_tests", "top1_err"),
    ("Factor of guidance", "training", "guidance_factor"),
    ("Learning rate", "training", "lr"),
)


def describe_model(run: RunRecord) -> str:
    """Name a run's model and data in a few words."""
    config = run.config
    guided = config.get("DISTILLATION.ENABLE_INTER") or config.get("DISTILLATION.ENABLE_LOGIT")
    size = config.get("MODEL.IMG_SIZE")
    return (
        f"{config.get('MODEL.TYPE')} on {config.get('TRAIN.DATASET')}, {size} x {size} pixels"
        f"{', guided' if guided else ''}"
    )


def cards(subjects: Sequence[Subject]) -> str:
    """Return a card for each run with its main numbers."""
    return page.grid((_card(subject) for subject in subjects), "cards")


def _card(subject: Subject) -> str:
    run = subject.run
    facts = []
    if subject.tested is not None:
        result = subject.tested.result
        value = 100 - result.top1_err
        num_hits = int(results.hits(subject.tested.predictions).sum())
        low, high = wilson_interval(num_hits, result.count)
        under = f"top-1, 95 % interval {low:.1f} to {high:.1f}, {result.count:,} images"
        facts += [
            ("macro-F1", f"{result.macro_f1:.1f} %"),
            ("calibration error", f"{result.calibration_err:.1f} %"),
        ]
    else:
        tests = [*run.tests.values()]
        value = 100 - tests[-1]["top1_err"] if tests else float("nan")
        under = "top-1 of the last epoch, from the log" if tests else "no test in the log"
    if run.hours:
        facts.append(("training", format_time(3600 * run.hours)))
    if run.cost:
        facts += [
            ("parameters", f"{run.cost['params'] / 1e6:.2f} M"),
            ("multiply-adds", amount(run.cost["macs"])),
        ]
    done = len(run.training)
    facts.append(("epochs", f"{done}" if done == run.length else f"{done} of {run.length}"))
    rows = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in facts)
    big = f"{value:.1f}<small>%</small>" if value == value else page.MISSING
    return (
        f'<article class="card {page.run_class(subject.number)}">'
        f'<p class="name">{escape(run.name)}</p>'
        f'<p class="what">{escape(describe_model(run))}</p><p class="big">{big}</p>'
        f'<p class="under">{escape(under)}</p><dl>{rows}</dl></article>'
    )


def amount(macs: float) -> str:
    """Format multiply-adds as G, or M below 0.1 G."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e8 else f"{macs / 1e6:.1f} M"


def differences(subjects: Sequence[Subject]) -> str:
    """Return what distinguishes the runs: their settings, and their accuracy on the same images."""
    runs = [subject.run for subject in subjects]
    if len(runs) < 2:
        return ""
    changed = changed_settings(runs)
    heads = ["setting", *(page.run_name(k, run.name) for k, run in enumerate(runs))]
    rows = [[page.key(key), *map(shown, values)] for key, values in changed.items()]
    html = ""
    tested = [(s.run.name, s.tested.predictions) for s in subjects if s.tested is not None]
    for (first, a), (second, b) in itertools.combinations(tested, 2):
        if results.same_images(a, b):
            html += page.paragraph(_compared(first, second, results.difference(b, a)))
        else:
            html += page.note(f"{first} and {second} were tested on different images.")
    if not rows:
        return html + page.paragraph("All settings that change results are the same.")
    return html + page.table(heads, rows, kind="settings")


def _compared(first: str, second: str, gap: results.Difference) -> str:
    p_value = "< 0.001" if gap.p_value < 0.001 else f"= {gap.p_value:.3f}"
    return (
        f"{second} minus {first}: {gap.points:+.2f} points on the same images (95 % interval "
        f"{gap.low:+.2f} to {gap.high:+.2f}; exact McNemar test p {p_value}). {gap.only_first} "
        f"images are wrong only with {first}, {gap.only_second} only with {second}. This compares "
        "two sets of weights: how much training with another seed differs is not included."
    )


def shown(value: object) -> str:
    """Return a config value as HTML."""
    return page.MISSING if value in (None, "") else escape(str(value))


def curves(subjects: Sequence[Subject]) -> str:
    """Return the curves of all terms, one chart a term and one line a run."""
    charts = []
    for title, group, key in _PANELS:
        series = {}
        for subject in subjects:
            change = (lambda error: 100 - error) if key == "top1_err" else float
            x, y = subject.run.series(group, key, change)
            if x:
                series[subject.number] = x, y
        is_idle = key == "guidance_factor" and all(set(y) == {1.0} for _, y in series.values())
        if series and not is_idle:
            percent = key == "top1_err"
            charts.append(page.chart(figures.lines(title, series, percent=percent)))
    if not charts:
        return page.note("No epoch is in the logs yet.")
    return page.legend([subject.run.name for subject in subjects]) + page.grid(charts)


def cost(subjects: Sequence[Subject]) -> str:
    """Return what each run cost."""
    heads = ["run", "parameters", "multiply-adds", "epochs", "time", "per epoch", "peak memory"]
    has_machine = any(subject.run.machine for subject in subjects)
    heads += ["hardware"] * has_machine
    rows = []
    for subject in subjects:
        run = subject.run
        epochs = [*run.training.values()]
        memory = max((line.get("mem") or 0 for line in epochs), default=0)
        rows.append(
            [
                page.run_name(subject.number, run.name),
                f"{run.cost['params']:,}" if run.cost else page.MISSING,
                amount(run.cost["macs"]) if run.cost else page.MISSING,
                f"{len(epochs)} of {run.length}",
                format_time(3600 * run.hours),
                f"{3600 * run.hours / len(epochs):.1f} s" if epochs else page.MISSING,
                f"{memory:,} MB" if memory else page.MISSING,
                *([hardware(run)] * has_machine),
            ]
        )
    return page.paragraph(
        "Multiply-adds are those of one image through the trained model; the guide is not part of "
        "it. Time is the sum over the epochs in the log, tests included."
    ) + page.table(heads, rows)


def hardware(run: RunRecord) -> str:
    """Return the hardware of a run as HTML."""
    count = run.machine.get("processes", 1)
    times = f"{count} x " if count > 1 else ""
    return shown(f"{times}{run.machine['hardware']}" if run.machine else None)


def settings(subjects: Sequence[Subject]) -> str:
    """Return how each run was made: machine, version, and settings other than the defaults."""
    html = ""
    for subject in subjects:
        run = subject.run
        known = {"folder": str(run.folder), **run.machine, **own_settings(run)}
        rows = [[page.key(key), shown(value)] for key, value in known.items()]
        html += page.details(run.name, page.table(["setting", "value"], rows, kind="settings"))
    return page.paragraph("Settings of each run that differ from the defaults.") + html
