"""`--mode report`: write one HTML file about one or several runs."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence

import lg
from lg.files.atomic import write_text
from lg.tools.report import focus, mistakes, mixing, quality, summary
from lg.tools.report.page import Section, page
from lg.tools.report.runs import read_runs
from lg.tools.report.subject import Subject, test_runs


def report(*, out_dirs: list[str], out: str | None, opts: Sequence[str]) -> None:
    """Write a page about runs; it needs no network and no other file.

    What cannot be shown, for lack of weights, images or packages, is named on the page.

    Args:
        out_dirs: Folders of the runs.
        out: The file; None for report.html in the first folder.
        opts: Overrides of the runs' configs, KEY VALUE KEY VALUE ..., such as DATA_LOADER.ROOT.

    Raises:
        DataError: A folder has no log of a run.
        ConfigError: A config cannot be used with the overrides.
    """
    runs = read_runs(out_dirs)
    path = out or str(runs[0].folder / "report.html")
    subjects = test_runs(runs, opts)
    html = build_page(subjects)
    write_text(path, html)
    for subject in subjects:
        if subject.problem:
            print(f"{subject.run.name} was not tested: {subject.problem}")
    print(f"Written to {path} ({os.path.getsize(path) / 1e6:.1f} MB).")


def build_page(subjects: Sequence[Subject]) -> str:
    """Return the whole page."""
    names = [subject.run.name for subject in subjects]
    title = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    sections = [
        Section("differences", "Differences", summary.differences(subjects)),
        Section("curves", "Curves", summary.curves(subjects)),
        Section("accuracy", "Accuracy", quality.accuracy(subjects)),
        Section("confusion", "Confusion matrix", quality.confusions(subjects)),
        Section("classes", "Classes", quality.classes(subjects)),
        Section("calibration", "Calibration", quality.calibration(subjects)),
        Section("mistakes", "Worst mistakes", mistakes.worst(subjects)),
        Section("labels", "Suspected wrong labels", mistakes.suspects(subjects)),
        Section("distance", "Attention distance", focus.distances(subjects)),
        Section("maps", "Where the models look", focus.maps(subjects)),
        Section("mixture", "Mixing weights", mixing.mixtures(subjects)),
        Section("cost", "Cost", summary.cost(subjects)),
        Section("settings", "Settings", summary.settings(subjects)),
    ]
    count = f"{len(names)} runs, w" if len(names) > 1 else "W"
    subtitle = f"{count}ritten {datetime.date.today():%d %B %Y} with lg {lg.__version__}."
    return page(title, subtitle, summary.cards(subjects), sections)
