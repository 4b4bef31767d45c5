"""`--seeds`: runs of several seeds, their table and their file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import run_net
from lg import builders, trainer
from lg.distributed import World
from lg.errors import ConfigError
from lg.logs.log import json_line
from lg.tools import seeds
from tests.run_cases import CONFIGS, TINY, dotted, key_values

CONFIG = str(CONFIGS / "digits/vit_digits_base.yaml")


def opts(out_dir: Path, **changes: Any) -> list[str]:
    values = {**TINY, "OPTIM.MAX_EPOCH": 1, "OPTIM.EMA_UPDATE_PERIOD": 0, "OUT_DIR": out_dir}
    values |= dotted(changes)
    return key_values(values)


def test_the_command_line_separates_seeds_from_overrides() -> None:
    start = ["--mode", "train"]
    for words in (
        [*start, "--seeds", "1", "2", "--cfg", "c.yaml", "OUT_DIR", "x"],
        [*start, "--cfg", "c.yaml", "--seeds", "1", "2", "OUT_DIR", "x"],
    ):
        args = run_net.parse_args(words)
        assert (args.seeds, args.opts, args.cfg) == ([1, 2], ["OUT_DIR", "x"], "c.yaml")
    assert run_net.parse_args([*start, "--cfg", "c", "A", "1"]).opts == ["A", "1"]
    with pytest.raises(SystemExit):
        run_net.parse_args(["--mode", "test", "--seeds", "1", "--cfg", "c"])


def test_seeds_are_trained_once_and_summarized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, train_step = [], trainer.train_step
    monkeypatch.setattr(
        trainer, "train_step", lambda *a, **k: steps.append(1) or train_step(*a, **k)
    )
    words = ["run_net.py", "--mode", "train", "--seeds", "1", "2", "--cfg", CONFIG]
    monkeypatch.setattr(sys, "argv", [*words, *opts(tmp_path)])
    for _ in range(2):
        run_net.main()
        assert len(steps) == 2 * 4  # the second time, finished runs are read
    found = json.loads((tmp_path / "seeds.json").read_text())
    first, second = (found["seeds"][n]["top1_err"] for n in "12")
    assert first != second and found["seeds"]["1"]["choice"] == "last epoch"
    assert found["summary"]["top1_err"]["mean"] == pytest.approx((first + second) / 2)
    # Half the interval of two values: t(0.975, 1) = 12.7062 times half their difference.
    half = 12.7062 * abs(first - second) / 2
    assert found["summary"]["top1_err"]["interval95"] == pytest.approx(half, rel=1e-5)
    said = capsys.readouterr().out.splitlines()
    assert said[-6] == "digits/test, last epoch, percent"
    assert f"{100 - (first + second) / 2:.2f} ± {half:.2f}" in said[-4]
    straight = tmp_path / "straight"
    monkeypatch.setattr(
        sys, "argv", ["run_net.py", "--mode", "train", "--cfg", CONFIG, *opts(straight, RNG_SEED=2)]
    )
    run_net.main()
    assert seeds.read_result(str(straight), validated=False)["top1_err"] == second


def test_the_interval_of_three_values() -> None:
    results = [dict.fromkeys(seeds.ROWS, value) for value in (1.0, 2.0, 6.0)]
    summary = seeds.summarize(results)["macro_f1"]
    # Standard deviation sqrt(7), t(0.975, 2) = 4.30265.
    assert summary["mean"] == 3 and summary["interval95"] == pytest.approx(
        4.30265 * (7 / 3) ** 0.5, rel=1e-5
    )
    assert seeds.summarize(results[:1])["macro_f1"] == {"mean": 1, "interval95": None}


def test_all_seeds_of_a_guided_model_hold_out_the_same_images(
    tmp_path: Path, guide_file: Path
) -> None:
    given: list[Any] = []

    def train(cfg: Any) -> None:
        given.append(builders.fetch_data(cfg, World()))
        raise KeyboardInterrupt

    guided = opts(tmp_path, TRAIN__VAL_FRACTION=0.25, DISTILLATION__TEACHER_WEIGHTS=guide_file)
    guided += ["DISTILLATION.INTER_STUDENT_INDEX", "[0, 1]"]
    guided += ["DISTILLATION.INTER_TEACHER_INDEX", "[0, 2]"]
    for number in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            seeds.train_seeds(CONFIG.replace("base", "ours"), guided, [number], train)
    first, second = given
    assert first.test.indices.tolist() == second.test.indices.tolist()
    assert first.train.indices.tolist() == second.train.indices.tolist()


def test_the_final_test_is_reported_if_there_is_one(tmp_path: Path) -> None:
    seeds.train_seeds(CONFIG, opts(tmp_path, TRAIN__VAL_FRACTION=0.25), [4], trainer.train)
    (found,) = json.loads((tmp_path / "seeds.json").read_text())["seeds"].values()
    assert found["split"] == "digits/test" and found["choice"].startswith("best epoch")


def test_seeds_that_cannot_run_here_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="1 1: give each seed once"):
        seeds.train_seeds(CONFIG, opts(tmp_path), [1, 1], trainer.train)
    with pytest.raises(ConfigError, match=r"set LAUNCH\.MODE local"):
        seeds.train_seeds(CONFIG, opts(tmp_path, LAUNCH__MODE="slurm"), [1, 2], trainer.train)


def test_the_weight_average_counts_where_held_out_images_choose(tmp_path: Path) -> None:
    rates = dict.fromkeys(seeds.ROWS, 50.0) | {"split": "folder/held-out", "epoch": "1/1"}
    lines = [json_line("test_epoch", {**rates, "top1_err": 40.0})]
    lines.append(json_line("test_ema_epoch", {**rates, "top1_err": 30.0}))
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    assert seeds.read_result(str(tmp_path), validated=True)["top1_err"] == 30.0
    assert seeds.read_result(str(tmp_path), validated=False)["top1_err"] == 40.0
