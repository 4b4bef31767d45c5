"""The runs of the methods: which settings a method adds, and which runs count as finished."""

import itertools
from pathlib import Path
from typing import Any

import pytest

import lg
from benchmarks import digits_demo, methods
from lg.config import is_guided
from lg.logs.log import json_line

DIGITS = "configs/digits/vit_digits_ours.yaml"


def test_a_method_adds_its_settings_to_those_of_the_config():
    assert methods.method([DIGITS, "RNG_SEED", "3"], "guided") == ["RNG_SEED", "3"]
    plain = lg.load_config(DIGITS, methods.method([DIGITS], "plain"))
    assert not is_guided(plain)
    assert methods.method([DIGITS], "lift") == ["TRANSFORMER.LIFT", "192"]


def test_a_run_is_finished_once_its_last_epoch_is_tested(tmp_path: Path):
    log = tmp_path / "log.txt"
    assert not methods.is_finished(log)
    lines = [json_line("train_epoch", {"epoch": epoch}) for epoch in ("1/2", "2/2")]
    lines.append(json_line("test_epoch", {"epoch": "1/2", "top1_err": 50.0}))
    log.write_text("\n".join(lines) + "\n")
    assert not methods.is_finished(log)
    lines.append(json_line("test_epoch", {"epoch": "2/2", "top1_err": 40.0}))
    log.write_text("\n".join(lines) + "\n")
    assert methods.is_finished(log)


@pytest.mark.parametrize("script", [methods, digits_demo])
def test_each_seed_trains_on_other_images(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        commands.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(script.subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        if script is methods:
            methods.train(DIGITS, [], 3, tmp_path)
        else:
            digits_demo.train("r-8_digits", seed=3, out=tmp_path)
    given = dict(itertools.pairwise(commands[0]))
    assert given["RNG_SEED"] == given["TRAIN.SPLIT_SEED"] == "3"
