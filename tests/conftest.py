"""Fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lg


@pytest.fixture(autouse=True)
def plenty_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report no lack of cores or threads, which depends on what else the machine does."""
    monkeypatch.setattr("lg.tools.doctor.trial._CLEARLY", 0.0)
    for module in ("lg.logs.reporter", "lg.tools.doctor.trial"):
        monkeypatch.setattr(f"{module}.core_wait_seconds", lambda: 0.0)


@pytest.fixture(scope="session")
def guide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an untrained guide, saved as training saves them."""
    cfg = lg.load_config("configs/digits/r-8_digits.yaml")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("guide") / "model.pyth"
    torch.save(lg.published_state_dict(lg.build_model(cfg)), path)
    return path
