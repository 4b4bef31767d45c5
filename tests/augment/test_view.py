"""Views describe crops and flips."""

from __future__ import annotations

import torch

from lg.augment.view import View


def test_view_as_a_tensor() -> None:
    assert View().tensor().tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    tensor = View(0.25, -0.125, 0.5, 0.75, True).tensor()
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == [0.25, -0.125, 0.5, 0.75, 1.0]
