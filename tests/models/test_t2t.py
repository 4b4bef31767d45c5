"""T2T-ViT's soft splits on GPUs equal those on CPUs, and are launched once a batch."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lg.models.t2t import _soft_split, _windows


@pytest.mark.parametrize(
    ("channels", "side", "kernel", "stride", "padding"),
    [(3, 32, 7, 4, 2), (8, 14, 3, 2, 1), (8, 9, 3, 3, 0)],
)
def test_windows_equal_unfold(
    channels: int, side: int, kernel: int, stride: int, padding: int
) -> None:
    tokens = torch.randn(2, side * side, channels, dtype=torch.float64)
    features = tokens.transpose(1, 2).unflatten(2, (side, side)).requires_grad_()
    results = [split(features, kernel, stride, padding) for split in (_soft_split, _windows)]
    assert torch.equal(*results)
    weights = torch.randn_like(results[0])
    mine, theirs = (torch.autograd.grad((r * weights).sum(), features)[0] for r in results)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


class Calls(TorchDispatchMode):
    """Collects the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_gpus_do_not_unfold_image_by_image() -> None:
    with FakeTensorMode(), Calls() as calls:
        tokens = _soft_split(torch.empty(2, 3, 32, 32, device="cuda"), 7, 4, 2)
    assert tokens.shape == (2, 64, 147) and tokens.device.type == "cuda"
    assert "im2col" not in calls.names and calls.names.count("unfold") == 2
