"""The reporter: its warning about cores that other programs use, and the time of an epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lg.logs import reporter
from lg.logs.log import RunLog, read_json_lines
from lg.logs.pictures import Pictures
from lg.logs.reporter import Reporter

MEANS = {"cls": 1.0, "loss": 1.0, "top1_err": 50.0, "top5_err": 10.0}


def make_reporter(log: RunLog, device: str, *, steps_per_epoch: int) -> Reporter:
    return Reporter(
        log=log,
        pictures=Pictures(log, [], enabled=False),
        device=torch.device(device),
        split="s/test",
        final_split="",
        steps_per_epoch=steps_per_epoch,
        max_epoch=3,
        batch_size=1,
        num_classes=10,
        inter=False,
        logit=False,
    )


# Seconds of waiting in three epochs of 10 seconds each.
@pytest.mark.parametrize(
    ("device", "waited", "said"),
    [
        ("cpu", [1.9, 2.1, 4.0], "Training waited 21% of the epoch for a core. Other programs"),
        ("cpu", [1.9, 1.9, 1.9], None),
        ("meta", [9.0, 9.0, 9.0], None),
    ],
)
def test_waiting_for_cores_is_reported_once(
    device: str,
    waited: list[float],
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = {"now": 0.0, "waited": 0.0}
    monkeypatch.setattr(reporter, "core_wait_seconds", lambda: clock["waited"])
    monkeypatch.setattr(reporter.time, "perf_counter", lambda: clock["now"])
    log = RunLog(tmp_path)
    report = make_reporter(log, device, steps_per_epoch=1)
    for epoch, seconds in enumerate(waited):
        report.start_epoch(epoch, 0)
        clock["now"] += 10
        clock["waited"] += seconds
        report.train_epoch(MEANS, epoch=epoch, lr=0.1, factor=1.0, mixture=[])
    report.log.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (said is not None) and (said is None or said in lines[0])


def test_the_time_of_an_epoch_includes_steps_before_it_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(reporter.time, "perf_counter", lambda: clock["now"])
    log = RunLog(tmp_path)
    report = make_reporter(log, "cpu", steps_per_epoch=6)
    report.start_epoch(0, 4)
    for _ in range(2):
        clock["now"] += 10
        report.count_step()
    report.train_epoch(MEANS, epoch=0, lr=0.1, factor=1.0, mixture=[])
    log.close()
    assert read_json_lines(tmp_path / "log.txt")[0]["time_epoch"] == 60
