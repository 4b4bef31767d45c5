"""The table of methods: intervals, gains, and which runs count as finished."""

from pathlib import Path

from benchmarks import methods
from lg.logs.log import json_line


def test_intervals_and_gains_are_over_seeds():
    # Student t at 97.5 % with one degree of freedom is 12.706; the standard error is 1.
    assert methods.interval([60.0, 62.0]) == "61.0 ± 12.7"
    lines = methods.table({"guided": [(90.0, 9.0), (92.0, 11.0)], "mix": [(91.0, 20.0)] * 2})
    assert lines.splitlines()[2:] == [
        "| guided, as published | 91.0 ± 12.7 |  | 10 |",
        "| `INTER_STUDENT_INDEX mix` | 91.0 ± 0.0 | 0.0 ± 12.7 | 20 |",
    ]


def test_a_run_counts_once_its_last_epoch_is_tested(tmp_path: Path):
    log, lines = tmp_path / "log.txt", []
    for epoch in ("1/2", "2/2", "2/2"):  # the last one repeated after a crash
        lines.append(json_line("train_epoch", {"epoch": epoch, "time_epoch": 3.0}))
    lines.append(json_line("test_epoch", {"epoch": "1/2", "top1_err": 50.0}))
    log.write_text("\n".join(lines) + "\n")
    assert methods.result(log) is None
    lines.append(json_line("test_epoch", {"epoch": "2/2", "top1_err": 40.0}))
    log.write_text("\n".join(lines) + "\n")
    assert methods.result(log) == (60.0, 6.0)
