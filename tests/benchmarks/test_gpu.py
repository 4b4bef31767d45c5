"""The cases of benchmarks/gpu.py: finished ones are kept, failed ones repeated, time is bounded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu


def test_finished_cases_are_kept_and_failed_ones_repeated(tmp_path: Path) -> None:
    calls: list[str] = []

    def case(outcome: str) -> Any:
        def run(left: float) -> dict[str, Any]:
            calls.append(outcome)
            return {"outcome": outcome}

        return run

    for outcome in ("failed", "stopped", "done", "failed"):
        gpu.Cases(tmp_path, minutes=1).run("a/b c", case(outcome), needs=5)
    assert calls == ["failed", "stopped", "done"]
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text()) == {"case": "a/b c", "outcome": "done"}


def test_no_case_starts_without_enough_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.Cases(tmp_path, minutes=1).run("long", pytest.fail, needs=61)
    assert "long: no time left" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_commands_are_stopped_in_time_and_report_their_last_line() -> None:
    def python(code: str, seconds: float) -> dict[str, Any]:
        return gpu.call([sys.executable, "-c", code], seconds)

    done = python("print('a'); print('b')", 20)
    assert (done["outcome"], done["last"]) == ("done", "b")
    failed = python("print('a'); raise ValueError('no such kernel')", 20)
    assert (failed["outcome"], failed["last"]) == ("failed", "ValueError: no such kernel")
    slow = python("import time; time.sleep(30)", 0.2)
    assert slow["outcome"] == "stopped" and slow["seconds"] < 10


def test_tables_hold_the_numbers_of_all_parts(tmp_path: Path) -> None:
    results: dict[str, dict[str, Any]] = {
        "correctness": {"outcome": "failed", "seconds": 2.5, "reason": "no NCCL"},
        "speed": {
            "outcome": "done",
            "images_per_second": {"ceiling": 12345.6, "guided": 9876.5},
        },
        "accuracy": {"outcome": "done", "epochs": "2/3", "hours": 0.5, "tests": [{"top1_err": 30}]},
    }
    for part, result in results.items():
        gpu.Cases(tmp_path / part, minutes=1).save("x", **result)
    gpu.write_table(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| x | failed | 2.5 | no NCCL |" in text
    assert "| x | 12,346 | 0 | 0 | 9,876 | 0 |" in text
    assert "| x | 2/3 | 70.00 | 0.50 |" in text


def test_without_a_gpu_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "correctness", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="No GPU found"):
        gpu.main()
    assert not list(tmp_path.iterdir())
