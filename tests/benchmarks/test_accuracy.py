"""The accuracy tables are written from the logs, and a table that differs is noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import accuracy

ROOT = Path(accuracy.__file__).parents[1]


def log(top1: float, seconds: float = 1800.0) -> list[dict]:
    test = {"_type": "test_epoch", "split": "flowers/test", "top5_err": 1.0, "time_epoch": seconds}
    return [
        {"_type": "cfg", "OUT_DIR": "/a/b", "RNG_SEED": 7, "OPTIM": {"MAX_EPOCH": 2}},
        {"_type": "complexity", "params": 1_500_000, "macs": 250_000_000},
        {"_type": "train_epoch", "epoch": "1/2", "time_epoch": 900.0},
        {"_type": "train_epoch", "epoch": "2/2", "time_epoch": 900.0},
        {**test, "epoch": "2/2", "top1_err": 100 - top1},
    ]


def test_compact_keeps_settings_tests_and_time():
    run = accuracy.compact(log(60.0))
    assert run["settings"] == {"OPTIM.MAX_EPOCH": 2, "RNG_SEED": 7}
    assert (run["parameters"], run["macs"], run["epochs"], run["hours"]) == (
        1_500_000,
        250_000_000,
        "2/2",
        1.0,
    )
    assert run["tests"] == [
        {"epoch": "2/2", "split": "flowers/test", "top1_err": 40.0, "top5_err": 1.0}
    ]


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    for name, top1 in (("one", 60.0), ("two", 62.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(accuracy.compact(log(top1))))
    monkeypatch.setattr(accuracy, "EVIDENCE", tmp_path)


def test_table_gives_mean_and_student_interval(evidence):
    rows = [{"label": "plain", "runs": ["one"]}, {"label": "guided", "runs": ["one", "two"]}]
    lines = accuracy.table(rows).splitlines()
    assert lines[2] == "| plain | 1.50 M | 0.25 | 2 | 1 | 60.0 |  |  | 1.0 |"
    # Student t at 97.5 % with one degree of freedom is 12.706; the standard error is 1.
    assert lines[3] == "| guided | 1.50 M | 0.25 | 2 | 2 | 61.0 ± 12.7 |  |  | 1.0 |"


def test_difference_is_taken_seed_by_seed(evidence):
    rows = [{"label": "gain", "runs": ["two", "two"], "minus": ["one", "two"]}]
    assert accuracy.table(rows).splitlines()[2] == "| gain |  |  |  | 2 | +1.0 ± 12.7 |  |  |  |"
    with pytest.raises(ValueError):
        accuracy.table([{"label": "gain", "runs": ["two"], "minus": ["one", "two"]}])


def test_gains_are_over_the_reference_with_the_same_seeds(evidence):
    entry = {"reference": ["one", "two"], "rows": {"guided": ["one", "two"], "mix": ["two", "two"]}}
    lines = accuracy.render(entry).splitlines()
    assert lines[2] == "| guided | 2 | 61.0 ± 12.7 |  | 3600 |"
    assert lines[3] == "| mix | 2 | 62.0 ± 0.0 | +1.0 ± 12.7 | 3600 |"
    del entry["rows"]["guided"], entry["rows"]["mix"][1]
    assert accuracy.render(entry).splitlines()[2] == "| mix | 1 | 62.0 | +2.0 | 3600 |"


def test_learning_curve_as_table_and_plot(evidence):
    series = {"plain": [["one"], ["one"]], "guided": [["one", "two"], ["two"]]}
    entry = {"images": [102, 2040], "series": series}
    lines = accuracy.curve_table(entry).splitlines()
    assert lines[0] == "| top-1, %, of training images: | 102 | 2,040 |"
    assert lines[2:] == ["| plain | 60.0 | 60.0 |", "| guided | 61.0 ± 12.7 | 62.0 |"]
    figure = Figure()
    accuracy.draw_curve(figure, entry)
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert drawn == {"plain": [60.0, 60.0], "guided": [61.0, 62.0]}


def test_fill_replaces_a_table_and_needs_its_marks(evidence):
    page = "a\n<!-- table t -->\nold\n<!-- end t -->\nb\n"
    filled = accuracy.fill(page, {"t": [{"label": "plain", "runs": ["one"]}]})
    assert "old" not in filled and "| plain |" in filled
    assert filled.startswith("a\n") and filled.endswith("\nb\n")
    empty = page.replace("old\n", "")
    assert accuracy.fill(empty, {"t": [{"label": "plain", "runs": ["one"]}]}) == filled
    with pytest.raises(ValueError, match="'other'"):
        accuracy.fill(page, {"other": []})


def test_tables_agree_with_the_logs():
    command = [sys.executable, "benchmarks/accuracy.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
