"""The reporter's warning about cores that other programs use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lg.logs import reporter
from lg.logs.log import RunLog
from lg.logs.pictures import Pictures
from lg.logs.reporter import Reporter

MEANS = {"cls": 1.0, "loss": 1.0, "top1_err": 50.0, "top5_err": 10.0}


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
    report = Reporter(
        log=log,
        pictures=Pictures(log, [], enabled=False),
        device=torch.device(device),
        split="s/test",
        final_split="",
        steps_per_epoch=1,
        max_epoch=3,
        batch_size=1,
        num_classes=10,
        inter=False,
        logit=False,
    )
    for epoch, seconds in enumerate(waited):
        report.start_epoch(epoch, 0)
        clock["now"] += 10
        clock["waited"] += seconds
        report.train_epoch(MEANS, epoch=epoch, lr=0.1, factor=1.0, mixture=[])
    report.log.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (said is not None) and (said is None or said in lines[0])
