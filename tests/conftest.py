"""Fixtures of all tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def plenty_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report no lack of cores, which depends on what else the machine does."""
    for module in ("lg.logs.reporter", "lg.tools.doctor.trial"):
        monkeypatch.setattr(f"{module}.core_wait_seconds", lambda: 0.0)
