"""The scripts of benchmarks/: all of them import, and the timed blocks of throughput.py run."""

import importlib
from pathlib import Path

import pytest

from benchmarks import throughput

SCRIPTS = sorted(path.stem for path in Path(throughput.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_imports(name: str):
    assert importlib.import_module(f"benchmarks.{name}").__doc__


def test_throughput_times_every_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(throughput, "matrix_rate", lambda device, dtype: 1.0)
    options = [*throughput.ONLINE, "DEVICE", "cpu", "TRAIN.BATCH_SIZE", "20"]
    ways, facts = throughput.prepare("configs/digits/vit_digits_ours.yaml", options, steps=2)
    assert list(ways) == ["ceiling", "loader", "unguided", "guided", "test"]
    assert all(0 < way() < 30 for way in ways.values())
    # 678,634 parameters in 16 tokens or more: two FLOPs per MAC, three passes.
    assert facts["batch_size"] == 20 and facts["step_flops"] > 6 * 16 * 600_000
