"""Cluster jobs: what they request, that they run, and that they resume after a preemption."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import lg
from lg import trainer
from lg.builders import build_resources
from lg.distributed.cluster import Job, submit
from lg.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/digits/vit_digits_base.yaml")


def tool(folder: Path, name: str, script: str) -> None:
    """Write a program that stands in for one of a cluster."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def submit_to_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *opts: str) -> str:
    """Submit a job to programs that stand in for Slurm and return the batch file."""
    tools = tmp_path / "bin"
    tools.mkdir()
    tool(tools, "srun", "exit 0")
    tool(tools, "sbatch", f'cp "$1" {tmp_path}/batch; echo Submitted batch job 4711')
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    asked = ["LAUNCH.MODE", "slurm", "NUM_GPUS", "16", "TRAIN.BATCH_SIZE", "160", *opts]
    cfg = lg.load_config(CONFIG, [*asked, "OUT_DIR", str(tmp_path)])
    said = submit(
        partial(trainer.train, cfg),
        mode="slurm",
        folder=f"{tmp_path}/jobs",
        resources=build_resources(cfg),
        max_retries=cfg.LAUNCH.MAX_RETRY,
    )
    assert said == f"Submitted job 4711. Its output: {tmp_path}/jobs/4711_0_log.out"
    return (tmp_path / "batch").read_text()


def test_slurm_gets_the_resources_of_the_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opts = "LAUNCH.NAME tiny LAUNCH.PARTITION learn LAUNCH.GPU_TYPE a100 LAUNCH.COMMENT thesis"
    more = "LAUNCH.TIME_LIMIT 90 LAUNCH.CPUS_PER_GPU 6 LAUNCH.MEM_PER_GPU 20 LAUNCH.EMAIL me@here"
    batch = submit_to_slurm(monkeypatch, tmp_path, *opts.split(), *more.split(), "DEVICE", "cuda")
    lines = [line.removeprefix("#SBATCH --") for line in batch.splitlines() if "#SBATCH" in line]
    asked = dict(line.split("=", 1) for line in lines if "=" in line)
    expected = {
        "job-name": "tiny",
        "partition": "learn",
        "constraint": "a100",
        "time": "90",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "6",
        "mem": "160GB",
        "mail-user": "me@here",
        "mail-type": "END",
        "signal": "USR2@90",
    }
    assert expected.items() <= asked.items()
    assert asked["comment"].strip("\"'") == "thesis"


def test_a_job_on_cpus_requests_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    batch = submit_to_slurm(monkeypatch, tmp_path, "DEVICE", "cpu")
    assert "gpus" not in batch and "constraint" not in batch and "mail" not in batch


def submit_nothing(folder: Path) -> None:
    resources = build_resources(lg.load_config(CONFIG, ["LAUNCH.MODE", "slurm"]))
    submit(print, mode="slurm", folder=str(folder), resources=resources, max_retries=3)


def test_a_machine_without_slurm_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"LAUNCH\.MODE is slurm, .* could not be submitted \("):
        submit_nothing(tmp_path)


def test_the_error_without_submitit_names_the_install_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[slurm\]'"):
        submit_nothing(tmp_path)


def test_a_requeued_job_is_the_same_job() -> None:
    job = Job(print)
    again = job.checkpoint()
    assert again.function is job and again.args == ()


def test_a_preempted_job_saves_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    sizes = "TRANSFORMER.HIDDEN_DIM 24 TRANSFORMER.DEPTH 2 TRANSFORMER.NUM_HEADS 2 LOG_PERIOD 4"
    recipe = "OPTIM.MAX_EPOCH 60 OPTIM.WARMUP_EPOCHS 0 TRAIN.BATCH_SIZE 30 TRAIN.FRACTION 0.2"
    opts = [*f"DEVICE cpu {sizes} {recipe}".split(), "OUT_DIR"]
    trainer.train(lg.load_config(CONFIG, [*opts, str(tmp_path / "straight")]))
    out_dir = tmp_path / "job"
    command = [
        sys.executable,
        "run_net.py",
        "--mode",
        "train",
        "--cfg",
        CONFIG,
        *opts,
        str(out_dir),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = tmp_path / "said"  # a file: the job keeps a pipe open as long as it runs
    with said.open("w") as stream:
        submitting = [*command, "LAUNCH.MODE", "submitit_local"]
        subprocess.run(submitting, env=environment, cwd=ROOT, stdout=stream, timeout=60, check=True)
    assert said.read_text().startswith("Submitted job ")
    log = out_dir / "log.txt"
    job = int(said.read_text().split()[2].rstrip("."))
    wait_for(lambda: log.exists() and "epoch 3/60" in output(out_dir))
    signal_tasks(job)
    wait_for(lambda: "Finished 60 epochs" in log.read_text())
    text = log.read_text()
    assert text.count("Stopped by SIGUSR2. Saved ") == 1 and text.count("Resuming after ") == 1
    names = ("straight", "job")
    straight, preempted = (
        torch.load(tmp_path / n / "checkpoints/model_epoch_0060.pyth", weights_only=True)
        for n in names
    )
    for name, value in straight["model_state"].items():
        assert torch.equal(value, preempted["model_state"][name]), name


def output(out_dir: Path) -> str:
    return "".join(path.read_text() for path in out_dir.glob("jobs/*_log.out"))


def signal_tasks(controller: int) -> None:
    """Send each process of a job the signal by which a cluster announces its end."""
    children = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    assert children
    for child in children:
        os.kill(int(child), signal.SIGUSR2)


def wait_for(condition: object, seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.02)
