"""Logs: JSON lines, console output, TensorBoard, and failed writes."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from lg.logs.log import RunLog, format_time, json_line, read_json_lines, read_run_lines
from tests.fault_cases import files_up_to


def test_json_line_is_sorted_and_has_its_kind() -> None:
    line = json_line("train_iter", {"b": 1, "a": "x", "c": [True, None]})
    assert line == 'json_stats: {"_type": "train_iter", "a": "x", "b": 1, "c": [true, null]}'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.3456789, "12.3457"),
        (100.0, "100.0000"),
        (1.0, "1.0000"),
        (0.0, "0.0000"),
        (0.123456, "0.1235"),
        (-2.00006, "-2.0001"),
        (5e-6, "0.000005"),
        (1.23456e-9, "1.235E-9"),
        (123456.789, "123456.7890"),
        (7, "7"),
        (True, "true"),
    ],
)
def test_floats_are_rounded(value: float, text: str) -> None:
    line = json_line("t", {"x": value, "deep": {"y": [value, (value,)]}})
    wanted = f'{{"_type": "t", "deep": {{"y": [{text}, [{text}]]}}, "x": {text}}}'
    assert line == f"json_stats: {wanted}"
    assert json.loads(wanted)["x"] == pytest.approx(value, abs=5.1e-5, rel=1e-3)


def test_non_finite_floats_are_null() -> None:
    line = json_line("t", {"a": math.nan, "b": [math.inf, -math.inf]})
    assert line == 'json_stats: {"_type": "t", "a": null, "b": [null, null]}'


def test_log_is_appended_and_its_stats_are_read_in_order(tmp_path: Path) -> None:
    for run in range(2):
        log = RunLog(tmp_path / "out", console=False)
        log.info(f"run {run}: é {{")
        log.stats("train_epoch", {"epoch": f"{run + 1}/2", "loss": 1.5 + run})
        log.stats("test_epoch", {"epoch": f"{run + 1}/2"})
        log.close()
        log.info("after the end")
        log.close()
    lines = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "run 0: é {" and lines[3] == "run 1: é {" and len(lines) == 6
    assert read_json_lines(tmp_path / "out" / "log.txt") == [
        {"_type": "train_epoch", "epoch": "1/2", "loss": 1.5},
        {"_type": "test_epoch", "epoch": "1/2"},
        {"_type": "train_epoch", "epoch": "2/2", "loss": 2.5},
        {"_type": "test_epoch", "epoch": "2/2"},
    ]


def test_each_line_is_written_immediately(tmp_path: Path) -> None:
    log = RunLog(tmp_path, console=False)
    log.stats("t", {"a": 1})
    assert read_json_lines(tmp_path / "log.txt") == [{"_type": "t", "a": 1}]
    log.close()


def test_disabled_log_prints_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path / "out", enabled=False)
    log.open_curves(1)
    log.start_bar("epoch", total=3)
    log.info("a"), log.warn("b"), log.write("c"), log.stats("t", {"d": 1}), log.scalars(1, {"e": 2})
    log.advance("f")
    log.close_bar()
    log.close()
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr() == ("", "")


def test_where_each_message_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path)
    log.info("said"), log.warn("warned"), log.write("written"), log.stats("t", {})
    log.advance(), log.advance("a summary")
    log.close()
    assert capsys.readouterr() == ("said\na summary\n", "Warning: warned\n")
    text = (tmp_path / "log.txt").read_text()
    assert text == 'said\nWarning: warned\nwritten\njson_stats: {"_type": "t"}\n'
    quiet = RunLog(tmp_path / "quiet", console=False)
    quiet.info("said"), quiet.warn("warned"), quiet.advance("a summary")
    quiet.close()
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "quiet/log.txt").read_text() == "said\nWarning: warned\n"


def test_invalid_unicode_is_escaped(tmp_path: Path) -> None:
    log = RunLog(tmp_path, console=False)
    log.info("a folder named \udcff")
    log.close()
    assert (tmp_path / "log.txt").read_text() == "a folder named \\udcff\n"


@pytest.mark.parametrize("how", ["removed", "rotated", "its folder removed"])
def test_removed_or_rotated_log_is_created_again(tmp_path: Path, how: str) -> None:
    path = tmp_path / "run" / "log.txt"
    log = RunLog(path.parent, console=False)
    log.info("before")
    if how == "its folder removed":
        shutil.rmtree(path.parent)
    elif how == "rotated":
        path.rename(path.with_name("log.txt.1"))
        path.write_text("of another program\n")
    else:
        path.unlink()
    log.info("after"), log.info("more")
    log.close()
    kept = "of another program\n" if how == "rotated" else ""
    assert path.read_text() == f"{kept}after\nmore\n"
    if how == "rotated":
        assert path.with_name("log.txt.1").read_text() == "before\n"


def test_full_disk_is_reported_once_and_cuts_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, console=False)
    log.open_curves(0)
    with files_up_to(330):
        for step in range(400):
            log.stats("t", {"step": step}), log.scalars(step, {"loss": 1.0})
    log.stats("t", {"step": 400}), log.scalars(400, {"loss": 1.0})  # there is room again
    log.close()
    out, err = capsys.readouterr()
    assert out == "" and sorted(err.splitlines()) == [
        f"Warning: {what} cannot be written (File too large); parts of it will be missing. "
        "Training continues."
        for what in (tmp_path / "log.txt", "TensorBoard curves")
    ]
    lines = [json.loads(x[12:]) for x in (tmp_path / "log.txt").read_text().splitlines()]
    kept = [x["step"] for x in lines]
    # 8 lines fit, 8 KiB are buffered until there is room, the rest is dropped.
    assert kept == [*range(len(kept) - 1), 400] and 100 < len(kept) < 350
    steps = [step for step, _ in scalars(tmp_path, "loss")]
    assert 1 < len(steps) < 12 and steps == [*range(len(steps) - 1), 400]


def test_log_that_cannot_be_opened_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    log = RunLog(tmp_path / "file" / "run")
    log.open_curves(0)
    log.info("said"), log.stats("t", {}), log.scalars(1, {"a": 1.0})
    log.close()
    out, err = capsys.readouterr()
    assert out == "said\n" and len(err.splitlines()) == 2
    assert err.count("cannot be written (Not a directory)") == 2


def test_closed_terminal_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

        def isatty(self) -> bool:
            return True

    log = RunLog(tmp_path)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Gone())
    log.info("said"), log.warn("warned"), log.advance("a summary")
    log.start_bar("epoch", total=2)
    log.advance("a summary"), log.advance(), log.close_bar()
    log.close()
    assert (tmp_path / "log.txt").read_text() == "said\nWarning: warned\n"


def test_line_after_a_cut_line_starts_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text('json_stats: {"_type": "t", "a": 1}\njson_stats: {"_ty')
    for _ in range(2):
        log = RunLog(tmp_path, console=False)
        log.stats("t", {"a": 2})
        log.close()
    assert [x["a"] for x in read_json_lines(tmp_path / "log.txt")] == [1, 2, 2]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4


def scalars(out_dir: Path, tag: str) -> list[tuple[int, float]]:
    """Return the points of a curve, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out_dir / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_tensorboard_hides_points_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    for first, last, value in ((0, 4, 1.0), (3, 6, 2.0)):
        log = RunLog(tmp_path, console=False)
        log.open_curves(first)
        for step in range(first, last):
            log.scalars(step, {"iteration/loss": value, "test/top1_acc": 10 * value})
        assert len(scalars(tmp_path, "iteration/loss")) == last  # though it may yet be killed
        log.close()
    for tag, factor in (("iteration/loss", 1), ("test/top1_acc", 10)):
        wanted = [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
        assert scalars(tmp_path, tag) == [(step, value * factor) for step, value in wanted]


def test_curves_continue_after_their_folder_is_removed(tmp_path: Path) -> None:
    log = RunLog(tmp_path, console=False)
    log.open_curves(1)
    log.scalars(1, {"loss": 1.0})
    shutil.rmtree(tmp_path / "tensorboard")
    log.scalars(2, {"loss": 2.0}), log.scalars(3, {"loss": 3.0})
    log.close()
    assert scalars(tmp_path, "loss") == [(2, 2.0), (3, 3.0)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (5, "5s"),
        (59.6, "1m 00s"),
        (184, "3m 04s"),
        (3599.7, "1h 00m"),
        (7380, "2h 03m"),
        (86400 + 2 * 3600 + 180, "1d 02h 03m"),
        (40 * 86400, "40d 00h 00m"),
    ],
)
def test_times_are_formatted(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_epochs_trained_or_tested_again_replace_their_results(tmp_path: Path) -> None:
    def line(kind: str, epoch: str, number: int) -> str:
        return json_line(kind, {"epoch": epoch, "n": number})

    lines = [line("train_epoch", f"{k}/3", k) for k in (1, 2, 3)]
    lines += [line("test_epoch", "3/3", 4), line("test_ema_epoch", "3/3", 5)]
    lines += [json_line("final_test", {"n": 6}), line("train_epoch", "2/4", 7)]
    lines += [line("test_epoch", "2/4", 8), line("test_ema_epoch", "2/4", 9)]
    lines += [line("test_epoch", "2/4", 10)]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    assert [found["n"] for found in read_run_lines(tmp_path / "log.txt")] == [1, 7, 9, 10]
