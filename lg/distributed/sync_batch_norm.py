"""BatchNorm whose statistics are those of the whole batch, over all processes.

On GPUs torch's own, which works nowhere else; on CPUs the same by two sums over processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether any BatchNorm of the model, as it stands, normalises with those of the batch."""
    return any(isinstance(each, _BatchNorm) and each.training for each in model.modules())


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Has each BatchNorm of a model use the statistics of the whole batch, in place.

    Names, parameters and stored statistics stay as they are.

    Args:
        model: On its device.
        device: Where it trains.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                if device.type == "cuda":
                    setattr(parent, name, convert_sync_batchnorm(child))
                else:
                    _synchronize_on_cpu(child)


class _SumOverProcesses(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs, since all use it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def _synchronize_on_cpu(norm: _BatchNorm) -> None:
    """Gives one BatchNorm (timm's, with their activation, too) a class of its own kind that
    synchronises."""
    kind = type(norm)
    norm.__class__ = type(f"Synced{kind.__name__}", (_SyncedForward, kind), {})


class _SyncedForward(_BatchNorm):
    """The forward pass of the class it is mixed into, with statistics over all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        normalised = self._normalise(x)
        if isinstance(self, BatchNormAct2d):
            return self.act(self.drop(normalised))
        return normalised

    def _normalise(self, x: Tensor) -> Tensor:
        # x is [N, C, ...]; statistics over all but C, shaped to broadcast.
        others = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = torch.tensor(x.numel() / x.shape[1], dtype=torch.float64)
        dist.all_reduce(count)
        total = count.item()
        mean = _SumOverProcesses.apply(x.sum(others)) / total
        centred = x - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(others)) / total
        if self.track_running_stats and self.running_mean is not None:
            self._follow(mean.detach(), variance.detach() * total / max(total - 1, 1))
        scaled = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is None:
            return scaled
        return scaled * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the stored statistics, as BatchNorm does."""
        assert self.running_mean is not None and self.running_var is not None
        step = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if step is None:  # the mean over all batches so far
                step = 1 / self.num_batches_tracked.item()
        assert step is not None
        self.running_mean.lerp_(mean, step)
        self.running_var.lerp_(variance, step)
