"""Several processes on this machine: they compute the same as one process and end together."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import lg
import lg.distributed.launch
from lg import distributed, trainer
from lg.distributed import World, gather_rows, in_turn, serve_store
from lg.logs.log import read_json_lines
from lg.logs.results import result_lines
from tests.distributed.distributed_cases import gradients
from tests.test_metrics import BY_HAND

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = str(ROOT / "configs/digits/vit_digits_base.yaml")
SIZES = {
    "DEVICE": "cpu",
    "TRANSFORMER.HIDDEN_DIM": 24,
    "TRANSFORMER.DEPTH": 2,
    "TRANSFORMER.NUM_HEADS": 2,
    "OPTIM.MAX_EPOCH": 3,
    "OPTIM.WARMUP_EPOCHS": 0,
    "TRAIN.FRACTION": 0.2,
    "TRAIN.BATCH_SIZE": 30,
    "TEST.PERIOD": 1,
    "DATA_LOADER.NUM_WORKERS": 1,
    "LOG_PERIOD": 4,
}
SMALL = [str(part) for pair in SIZES.items() for part in pair]
# One thread per process, and no variables of an outer torchrun.
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_"))},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def cases(name: str, size: int, folder: Path) -> subprocess.CompletedProcess[str]:
    script = str(HERE / "distributed_cases.py")
    return run(sys.executable, "-W", "ignore", script, name, str(size), str(folder))


@pytest.fixture(scope="module", params=[2, 3])
def found(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of two or three processes, in rank order."""
    folder = tmp_path_factory.mktemp("together")
    done = cases("together", request.param, folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return gradients(World())


def test_gradients_are_those_of_one_process_on_the_whole_batch(
    alone: dict[str, Any], found: list[dict[str, Any]]
) -> None:
    for variant, expected in alone.items():
        assert any(name.startswith("heads.") for name in expected["gradients"])
        for got in (each["gradients"][variant] for each in found):
            torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-12, atol=0)
            assert len(expected["gradients"]) > 20
            for name, value in expected["gradients"].items():
                torch.testing.assert_close(got["gradients"][name], value, rtol=1e-9, atol=1e-12)


def test_the_buffers_of_the_main_process_are_tested(found: list[dict[str, Any]]) -> None:
    """They are what the checkpoint holds, for the weights and for their average."""
    main, *others = (each["tested_buffers"] for each in found)
    assert main["tested"] == pytest.approx(main["alone"])
    for other in others:
        assert other["tested"] == main["tested"]
        assert other["alone"][0] != main["alone"][0] and other["alone"][1] != main["alone"][1]


def test_all_processes_skip_a_step_that_overflows_in_one(found: list[dict[str, Any]]) -> None:
    assert [each["overflow"] for each in found] == [{"same": True, "scale": 512.0}] * len(found)


def test_a_result_counts_the_samples_of_all_processes(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["result"] == pytest.approx(BY_HAND, abs=1e-4)


def test_samples_are_shared_without_overlap(found: list[dict[str, Any]]) -> None:
    steps = list(zip(*(each["shares"]["keys"] for each in found), strict=True))
    assert len(steps) == 2 * (50 // 12)
    for epoch in (0, 1):
        keys = [key for step in steps for share in step for key in share if key[0] == epoch]
        assert len(keys) == len(set(keys)) == 48


def test_the_main_process_downloads_first(
    found: list[dict[str, Any]],
) -> None:
    (_, began, ended), *others = (each["shares"]["turns"] for each in found)
    assert ended - began >= 0.3
    assert all(other[1] >= ended for other in others)


def test_a_killed_process_stops_all_within_half_a_minute_with_one_line(tmp_path: Path) -> None:
    done = cases("killed", 2, tmp_path)
    killed_at = (tmp_path / "1.pid").stat().st_mtime
    assert time.time() - killed_at < 30  # the other ignores SIGTERM
    assert done.returncode == 128 + 9
    said = [line for line in done.stderr.splitlines() if "Error" in line]
    assert said == [
        "Error: process 1 was killed by SIGKILL (often because memory ran out), so all processes "
        "were stopped. Run the same command to resume from the last checkpoint."
    ]
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def train(out_dir: Path, *opts: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "run_net.py", "--mode", "train", "--cfg", CONFIG, *SMALL]
    return run(*command, "OUT_DIR", str(out_dir), "NUM_GPUS", "2", *opts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three epochs in two processes."""
    out_dir = tmp_path_factory.mktemp("trained")
    done = train(out_dir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Finished 3 epochs. Top-1 of 597 images") == 1
    assert "Error" not in done.stderr and "Traceback" not in done.stderr
    return out_dir


def test_only_the_main_process_writes(trained: Path) -> None:
    lines = read_json_lines(trained / "log.txt")
    assert [line["iter"] for line in lines if line["_type"] == "train_iter"] == ["4/8", "8/8"] * 3
    assert [line["epoch"] for line in lines if line["_type"] == "train_epoch"] == [
        "1/3",
        "2/3",
        "3/3",
    ]
    state = torch.load(trained / "checkpoints/model_epoch_0003.pyth", weights_only=True)
    streams = [each["torch"] for each in state["rng_state"]]
    assert len(streams) == 2 and not torch.equal(*streams)


def test_any_number_of_processes_tests_every_image_once(trained: Path) -> None:
    opts = [*SMALL, "OUT_DIR", str(trained), "TEST.BATCH_SIZE", "100"]
    command = [sys.executable, "run_net.py", "--mode", "test", "--cfg", CONFIG, *opts]
    alone = trainer.test(lg.load_config(CONFIG, opts))
    assert alone.count == 597
    said = run(*command, "NUM_GPUS", "3").stdout.splitlines()
    told = [line for line in said if not line.startswith("[Gloo]")]  # printed by older versions
    assert told == result_lines(alone, split="digits/test")


def test_resuming_with_another_number_of_processes_warns(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opts = ["OUT_DIR", str(trained), "OPTIM.MAX_EPOCH", "4"]
    trainer.train(lg.load_config(CONFIG, [*SMALL, *opts]))
    said = capsys.readouterr()
    assert "Resuming after epoch 3 of 4." in said.out
    assert "Warning: Processes changed from 2 to 1: the result is not bit-identical." in said.err


def test_a_loss_that_is_not_finite_stops_all_with_one_line(tmp_path: Path) -> None:
    done = train(tmp_path, "OPTIM.BASE_LR", "1e30")
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()
    assert len(said) == 1
    assert re.match(r"Error: The loss is not finite in epoch 1, step \d: loss = nan", said[0])


def test_torchrun_resumes_after_a_process_was_killed(trained: Path, tmp_path: Path) -> None:
    """One of two processes is killed in the third epoch; torchrun restarts both."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    meet = ["--standalone", "--local-addr", "127.0.0.1", "--max-restarts", "1"]
    script = [str(HERE / "killed_once.py"), CONFIG, str(tmp_path), *SMALL]
    done = run(*torchrun, *meet, *script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Resuming after epoch 2 of 3.") == 1
    killed, undisturbed = (
        torch.load(folder / "checkpoints/model_epoch_0003.pyth", weights_only=True)
        for folder in (tmp_path, trained)
    )
    for name, value in undisturbed["model_state"].items():
        assert torch.equal(value, killed["model_state"][name]), name


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_nccl_gets_its_device_and_the_host_waits_on_gloo(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    calls: dict[str, Any] = {}
    for key, value in {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(distributed.world, "_connect", lambda rank, size: "store")
    monkeypatch.setattr(distributed.world, "_store", None)
    monkeypatch.setattr(distributed.world, "_host", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "init_process_group", lambda name, **k: calls.update(k, name=name))
    monkeypatch.setattr(dist, "new_group", lambda **k: calls.update(host=k) or "host")
    world = distributed.join(backend=backend)
    assert (world.rank, world.local_rank, calls["name"]) == (5, 1, backend)
    by_nccl = backend == "nccl"
    assert calls["device_id"] == (torch.device("cuda", 1) if by_nccl else None)
    assert calls.get("host", {}).get("backend") == ("gloo" if by_nccl else None)
    limits = [calls["timeout"], *([calls["host"]["timeout"]] if by_nccl else [])]
    assert limits == ([timedelta(minutes=30)] if by_nccl else []) + [timedelta(hours=6)]

    # Whatever waits for the main process waits on the host.
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    groups: list[Any] = []
    for name in ("barrier", "broadcast_object_list", "gather_object"):
        monkeypatch.setattr(dist, name, lambda *_, group: groups.append(group))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 6)
    with in_turn(World(size=6)):
        pass
    assert distributed.from_main(lambda: 3) == 3
    distributed.gather_objects(1)
    assert groups == ["host" if by_nccl else None] * 4


def test_a_world_of_one_process() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    assert gather_rows(rows) == [rows]
    with in_turn(World()):
        assert np.isfinite(rows.numpy()).all()


def test_a_restart_is_not_confused_by_what_earlier_starts_left() -> None:
    store = dist.HashStore()  # kept over restarts, as torchrun keeps its own
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            # The main process comes last, when the others have found what the earlier start left.
            others = [pool.submit(distributed.world._name_start, store, r, 3) for r in (1, 2)]
            if names:
                time.sleep(0.1)
                assert not any(other.done() for other in others)
            names.append(distributed.world._name_start(store, 0, 3))
            assert [other.result(timeout=10) for other in others] == [names[-1]] * 2
    assert len(set(names)) == 3


def test_the_store_listens_at_its_own_address_only() -> None:
    store = serve_store("localhost", 0)
    assert store.host == "127.0.0.1"
    with socket.create_connection(("127.0.0.1", store.port), timeout=5):
        pass
    with pytest.raises(OSError):  # also loopback, but not the address asked for
        socket.create_connection(("127.0.0.2", store.port), timeout=5)
    with pytest.raises(OSError, match=r"PORT_RANGE is \[(\d+), \1\]; no free port"):
        lg.distributed.launch._serve_at_free_port("localhost", (store.port, store.port))


def test_gloo_uses_the_interface_that_leads_to_the_other_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_linux = sys.platform.startswith("linux")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    distributed.world._choose_interface("127.0.0.1")
    assert os.environ.pop("GLOO_SOCKET_IFNAME", None) == ("lo" if on_linux else None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    distributed.world._choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
