"""`--mode time`: forward and backward passes alternate, and the gradients are freed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lg.datasets.loader import Batch
from lg.device import Precision
from lg.tools import timing


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_each_forward_pass_is_followed_by_its_backward_pass(
    monkeypatch: pytest.MonkeyPatch, accum_steps: int
) -> None:
    """CUDA graphs overwrite what an earlier forward pass left, so no other order works."""
    module, events = nn.Linear(3, 5), []

    def forward(run: Any, batch: Batch, targets: torch.Tensor) -> Any:
        events.append("forward")
        loss = (module(batch.images) * targets).sum()
        loss.register_hook(lambda _: events.append("backward"))
        return {"loss": loss}, None

    monkeypatch.setattr(timing, "forward", forward)
    device = torch.device("cpu")
    run = SimpleNamespace(
        module=module,
        device=device,
        precision=Precision(device),
        optimizer=torch.optim.SGD(module.parameters()),
        settings=SimpleNamespace(accum_steps=accum_steps),
    )
    zeros = torch.zeros(4, dtype=torch.int64)
    batch = Batch(torch.ones(4, 3), zeros, zeros, torch.zeros(4, 5))
    seconds = timing.time_passes(run, batch, torch.ones(4, 5))  # type: ignore[arg-type]
    assert events == ["forward", "backward"] * accum_steps
    assert all(value > 0 for value in seconds)
    assert all(parameter.grad is None for parameter in module.parameters())
