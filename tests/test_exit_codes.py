"""The exit codes in docs/exit-codes.md, of real commands."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_net
from tests.run_cases import TINY

ROOT = Path(__file__).parents[1]
DIGITS = "configs/digits/vit_digits_base.yaml"
DOCUMENTED = {
    int(code)
    for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs/exit-codes.md").read_text(), re.MULTILINE)
}


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("code", "command", "said"),
    [
        (0, "run_net.py --help", "modes"),
        (0, "run_net.py --mode keys BASE_LR", "OPTIM.BASE_LR"),
        (0, "precompute_feature.py --help", "--cfg"),
        (1, "run_net.py --mode keys NO_SUCH_KEY", "Error: No key matches"),
        (1, "run_net.py --mode train --cfg none.yaml", "Error: Cannot read the config"),
        (1, f"run_net.py --mode sweep --cfg {DIGITS}", "Error: --mode sweep varies nothing"),
        (1, "precompute_feature.py --cfg none.yaml", "Error: Cannot read the config"),
        (2, "run_net.py --mode tranining", "Did you mean train"),
        (2, "run_net.py --mode train", "--cfg"),
        (2, "run_net.py --mode keys --unknown", "--unknown"),
        (2, "precompute_feature.py", "--cfg"),
    ],
)
def test_codes_of_errors_and_usage(code: int, command: str, said: str) -> None:
    process = start(*command.split())
    out, err = process.communicate()
    assert process.returncode == code and code in DOCUMENTED
    assert said in (out if code == 0 else err)
    assert code != 1 or len(err.strip().splitlines()) == 1


def test_doctor_fails_on_a_problem() -> None:
    command = "run_net.py --mode doctor --cfg configs/digits/vit_digits_ours.yaml"
    process = start(*command.split(), "DISTILLATION.TEACHER_WEIGHTS", "none.pyth")
    out, _ = process.communicate()
    assert process.returncode == 1 and "none.pyth" in out


def test_codes_of_signals(tmp_path: Path) -> None:
    signals = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}  # -9: 137 in a shell
    processes = {}
    for signum in signals:
        values = {**TINY, "OPTIM.MAX_EPOCH": 10000, "OUT_DIR": tmp_path / str(signum)}
        opts = [str(word) for pair in values.items() for word in pair]
        processes[signum] = start("run_net.py", "--mode", "train", "--cfg", DIGITS, *opts)
    for signum, process in processes.items():
        checkpoints = tmp_path / str(signum) / "checkpoints"
        while not checkpoints.exists() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signum)
        out, err = process.communicate()
        assert process.returncode == signals[signum], err
        assert ("To resume: " in out) == (signum != signal.SIGKILL)
    assert {130, 143, 137} <= DOCUMENTED


def test_names_of_files_in_capitals_are_no_keys() -> None:
    words = ["--mode", "predict", "--images", "IMG_1.JPG", "B.PNG", "--out", "RESULTS.CSV"]
    args = run_net.parse_args([*words, "TEST.WEIGHTS", "w.pyth", "DEVICE=cpu"])
    assert (args.images, args.out) == (["IMG_1.JPG", "B.PNG"], "RESULTS.CSV")
    assert args.opts == ["TEST.WEIGHTS", "w.pyth", "DEVICE=cpu"]
