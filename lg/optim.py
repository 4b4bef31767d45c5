"""Optimisers, learning rate schedules and the weight average."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

NO_DECAY_TOKENS = ("cls_token", "pos_embed", "dist_token", "distill_token")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    head_names: set[str],
    no_decay: Collection[str] = (),
    weight_decay: float,
    head_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Split parameters into head and body, each with and without weight decay.

    Not decayed: biases, norms and other vectors, class and distillation tokens, position
    embeddings. Projection heads of the guidance belong to the body. Frozen parameters and empty
    groups are omitted.

    Args:
        named_parameters: Names and parameters of the trained module.
        head_names: Names of the classifier's parameters.
        no_decay: Names of further parameters that are not decayed.
        weight_decay: Of the decayed groups.
        head_lr_ratio: Learning rate of the head relative to the body.

    Returns:
        Groups for a torch optimiser, with the extra keys `name`, `parameter_names` and `lr_ratio`.
    """
    groups: dict[str, dict[str, Any]] = {}
    for part in ("head", "body"):
        for kind, decay in (("no_decay", 0.0), ("decay", weight_decay)):
            ratio = head_lr_ratio if part == "head" else 1.0
            groups[f"{part}_{kind}"] = dict(
                params=[],
                parameter_names=[],
                name=f"{part}_{kind}",
                weight_decay=decay,
                lr_ratio=ratio,
            )
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        last = name.rsplit(".", 1)[-1]
        plain = parameter.ndim <= 1 or last == "bias" or last.startswith(NO_DECAY_TOKENS)
        plain = plain or name in no_decay
        group = groups[
            f"{'head' if name in head_names else 'body'}_{'no_decay' if plain else 'decay'}"
        ]
        group["params"].append(parameter)
        group["parameter_names"].append(name)
    return [g for g in groups.values() if g["params"]]


def make_optimizer(
    groups: list[dict[str, Any]],
    *,
    kind: str,
    lr: float,
    momentum: float = 0.9,
    dampening: float = 0.0,
    nesterov: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """Create an optimiser: fused SGD, Adam (L2 in the gradient) or AdamW (decoupled decay) of
    torch, or Muon or NAdaMuon of timm.

    Muon orthogonalises the update of each weight matrix; parameters that are no matrices (biases,
    norms, tokens, position embeddings) are updated by AdamW, in NAdaMuon by NAdamW.

    Args:
        groups: As from `parameter_groups`.
        kind: sgd, adam, adamw, muon or nadamuon.
        lr: Learning rate of the body.
        momentum: Of SGD, Muon and NAdaMuon.
        dampening: Of the momentum of SGD.
        nesterov: Whether SGD uses Nesterov momentum.
        betas: Of Adam and AdamW, and with Muon and NAdaMuon of the parameters that are not
            matrices; the second also of the second moment of NAdaMuon.

    Raises:
        ValueError: An unknown `kind`.

    Source: Muon: https://kellerjordan.github.io/posts/muon; NAdaMuon: arXiv 2507.11005 with
    Nesterov momentum.
    """
    if kind == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov, fused=True
        )
    if kind == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas, fused=True)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    if kind in ("muon", "nadamuon"):
        # Position tables are matrices, too, but not of weights.
        groups = [{**g, "use_fallback": g["name"].endswith("no_decay")} for g in groups]
        return create_optimizer_v2(groups, opt=kind, lr=lr, momentum=momentum, betas=betas)
    raise ValueError(f"kind is {kind!r}; allowed: sgd, adam, adamw, muon, nadamuon.")


class LearningRate:
    """The learning rate of each epoch: a function of the epoch alone, so it has no state to save.

    During warm-up it rises linearly from `warmup_factor * base_lr` to `base_lr`. The policy counts
    epochs from 0, including the warm-up.
    """

    def __init__(
        self,
        *,
        policy: str,
        base_lr: float,
        max_epoch: int,
        min_lr: float = 0.0,
        steps: Sequence[int] = (),
        lr_mult: float = 0.1,
        warmup_factor: float = 0.1,
        warmup_epochs: int = 0,
    ) -> None:
        if policy not in ("cos", "lin", "exp", "steps"):
            raise ValueError(f"policy is {policy!r}; allowed: cos, lin, exp, steps.")
        self.policy, self.base_lr, self.max_epoch, self.min_lr = policy, base_lr, max_epoch, min_lr
        self.steps, self.lr_mult = tuple(steps), lr_mult
        self.warmup_factor, self.warmup_epochs = warmup_factor, warmup_epochs

    def at(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        if epoch < self.warmup_epochs:
            progress = epoch / self.warmup_epochs
            return self.base_lr * (self.warmup_factor * (1 - progress) + progress)
        done = epoch / self.max_epoch
        if self.policy == "cos":
            return self.min_lr + 0.5 * (self.base_lr - self.min_lr) * (1 + math.cos(math.pi * done))
        if self.policy == "lin":
            return self.base_lr + (self.min_lr - self.base_lr) * done
        if self.policy == "exp":
            return self.base_lr * (self.min_lr / self.base_lr) ** done
        return self.base_lr * self.lr_mult ** sum(0 < s <= epoch for s in self.steps)

    def apply(self, optimizer: torch.optim.Optimizer, epoch: int) -> float:
        """Set the learning rate of an epoch, times its `lr_ratio`, in every group; return it."""
        lr = self.at(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        return lr


class WeightAverage(ModelEmaV3):
    """Exponential moving average of a model's weights and buffers, kept in a copy, `module`.

    Every `period` optimiser steps: average += step * (weights - average), where
    step = min(1, alpha * batch_size / max_epoch * period), so that the effect depends little on
    these settings. During warm-up the weights are copied.

    Source: the EMA of pycls, whose keys (EMA_ALPHA, EMA_UPDATE_PERIOD) this project keeps.
    """

    def __init__(
        self, model: nn.Module, *, alpha: float, period: int, batch_size: int, max_epoch: int
    ) -> None:
        super().__init__(model, decay=1 - min(1.0, alpha * batch_size / max_epoch * period))
        self.period = period

    def follow(self, model: nn.Module, total_step: int, *, warming: bool) -> None:
        """Update the average after optimiser step `total_step` (counted from 0), if it is due."""
        if total_step % self.period == 0:
            self.set(model) if warming else self.update(model)
