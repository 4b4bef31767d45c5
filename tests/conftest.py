"""Fixtures of all tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def plenty_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report no lack of cores or threads, which depends on what else the machine does."""
    monkeypatch.setattr("lg.tools.doctor.trial._CLEARLY", 0.0)
    for module in ("lg.logs.reporter", "lg.tools.doctor.trial"):
        monkeypatch.setattr(f"{module}.core_wait_seconds", lambda: 0.0)
