"""The parts about how well the runs classify: accuracy, confusions, classes, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from lg.logs.plots import READABLE_CLASSES
from lg.tools.intervals import wilson_interval
from lg.tools.report import figures, page, results
from lg.tools.report.runs import RunRecord
from lg.tools.report.subject import Subject, with_tests

_MAX_PAIRS = 8  # confusions that are listed


def accuracy(subjects: Sequence[Subject]) -> str:
    """Return the table of accuracies, and how the tested weights were chosen."""
    heads = ["run", "images", "top-1", "95 % interval", "top-5", "balanced", "macro-F1"]
    heads += ["calibration error", "last epoch"]
    rows = []
    choices: dict[str, list[str]] = {}  # how weights were chosen -> runs
    for subject, tested in with_tests(subjects):
        predictions, result = tested.predictions, tested.result
        num_hits = int(results.hits(predictions).sum())
        low, high = wilson_interval(num_hits, result.count)
        last = [t for t in [*subject.run.tests.values()][-1:] if t["split"] == predictions.split]
        has_top5 = len(predictions.class_names) > 5
        rows.append(
            [
                page.run_name(subject.number, subject.run.name),
                f"{result.count:,}",
                f"<b>{100 - result.top1_err:.2f} %</b>",
                f"{low:.2f} to {high:.2f}",
                f"{100 - result.top5_err:.2f} %" if has_top5 else page.MISSING,
                f"{result.balanced_acc:.2f} %",
                f"{result.macro_f1:.2f} %",
                f"{result.calibration_err:.2f} %",
                f"{100 - last[0]['top1_err']:.2f} %" if last else page.MISSING,
            ]
        )
        choices.setdefault(_choice(subject.run, predictions.split), []).append(subject.run.name)
    notes = "".join(page.note(f"{', '.join(names)}: {text}") for text, names in choices.items())
    for subject in subjects:
        if subject.problem:
            notes += page.note(f"{subject.run.name} was not tested: {subject.problem}")
    if not rows:
        return notes
    return (
        page.paragraph(
            "The best weights of each run on the test images. Intervals are Wilson intervals: they "
            "hold for these weights and say how far the accuracy on other images of the same kind "
            "may be from this one."
        )
        + page.table(heads, rows)
        + notes
    )


def _choice(run: RunRecord, split: str) -> str:
    """Say which images chose the weights that were tested on `split`."""
    tests = [*run.tests.values(), *run.average_tests.values()]
    chosen_on = str(tests[-1]["split"]) if tests else ""
    if chosen_on and chosen_on != split:
        return f"the best epoch was chosen on {chosen_on}, not on {split}."
    return (
        f"the best epoch was chosen on the tested images ({split}) themselves, so its accuracy is "
        "optimistic; that of the last epoch is not."
    )


def confusions(subjects: Sequence[Subject]) -> str:
    """Return the confusion matrices."""
    charts = []
    for subject, tested in with_tests(subjects):
        names = tested.predictions.class_names
        counts = np.array(tested.result.confusion)[:, : len(names)]
        plot = figures.confusion_plot(counts, names, subject.number)
        html = plot if len(names) <= READABLE_CLASSES else plot + _pairs(counts, names)
        caption = page.run_name(subject.number, subject.run.name)
        charts.append(page.chart(html, caption, wide=len(names) > 12))
    if not charts:
        return ""
    text = "Rows are labels, columns predicted classes; the colour is the share of the row."
    return page.paragraph(text) + page.grid(charts, "charts large")


def _pairs(counts: np.ndarray, names: Sequence[str]) -> str:
    """Return the most frequent confusions as a table."""
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_PAIRS]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    rows = [
        [escape(names[row]), escape(names[column]), str(wrong[row, column])]
        for row, column in pairs
        if wrong[row, column]
    ]
    return page.table(["label", "predicted as", "images"], rows, kind="pairs") if rows else ""


def classes(subjects: Sequence[Subject]) -> str:
    """Return precision, recall and F1 of each class, the worst class of the first run on top."""
    tested = with_tests(subjects)
    if not tested:
        return ""
    by_names: dict[tuple[str, ...], list[tuple[Subject, list[results.ClassRow]]]] = {}
    for subject, each in tested:
        rows = results.class_rows(each.predictions)
        by_names.setdefault(tuple(each.predictions.class_names), []).append((subject, rows))
    text = (
        "Precision: of the images predicted as the class, the share that belong to it. Recall: of "
        "the class's images, the share that were found. F1 is their harmonic mean. Lowest F1 first."
    )
    return page.paragraph(text) + "".join(map(_class_table, by_names.values()))


def _class_table(group: Sequence[tuple[Subject, list[results.ClassRow]]]) -> str:
    heads = ["class", "images"]
    for subject, _ in group:
        name = page.run_name(subject.number, subject.run.name) + "<br>" if len(group) > 1 else ""
        heads += [f"{name}precision", "recall", "F1"]
    first = group[0][1]
    table = []
    for k in sorted(range(len(first)), key=lambda k: first[k].f1):
        cells = [escape(first[k].name), str(first[k].count)]
        for subject, rows in group:
            row, run = rows[k], page.run_class(subject.number)
            bar = f'<i class="bar {run}" style="--share:{row.f1:.0f}%"></i>'
            cells += [f"{row.precision:.1f}", f"{row.recall:.1f}", f"{row.f1:.1f}{bar}"]
        table.append(cells)
    return page.table(heads, table, kind="tall")


def calibration(subjects: Sequence[Subject]) -> str:
    """Return the reliability plot and what it shows."""
    tested = with_tests(subjects)
    if not tested:
        return ""
    rows, plotted = [], []
    for subject, each in tested:
        bins = results.reliability(each.predictions)
        plotted.append((subject.number, bins))
        mean = np.average(bins.confidence, weights=bins.counts)
        hit = np.average(bins.accuracy, weights=bins.counts)
        rows.append(
            [
                page.run_name(subject.number, subject.run.name),
                f"{mean:.2f} %",
                f"{hit:.2f} %",
                f"{each.result.calibration_err:.2f} %",
                "overconfident" if mean > hit else "underconfident",
            ]
        )
    text = (
        "A well calibrated model is right in 80 % of the images that it classifies with 80 % "
        "confidence: its points lie on the dashed line. Points below it mean overconfidence. The "
        f"expected calibration error is the mean distance over {results.NUM_BINS} bins of equal "
        "width, weighted by their images; larger points stand for more images."
    )
    heads = ["run", "mean confidence", "accuracy", "calibration error", "on average"]
    plot = page.chart(figures.reliability_plot(plotted))
    return page.paragraph(text) + page.beside(plot, page.table(heads, rows))
