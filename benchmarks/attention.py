#!/usr/bin/env python3
"""Time training steps with fused attention against a copy with unfused attention.

    python benchmarks/attention.py                     # every family, minutes on two cores
    python benchmarks/attention.py --models pvt-ti --batch-size 16 --repeats 20

The copy has the same weights and computes softmax(q k) v with explicit matrices. For ConViT it is
timm's model, which also computes the positional attention for every image. Steps (forward,
cross-entropy, backward, AdamW) of the two alternate in one process. Prints a table and writes
attention.json.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lg  # noqa: E402
from benchmarks.report import TRANSFORMERS, config_path, make_parser, write_json  # noqa: E402
from lg.device import Precision, select_device, synchronize  # noqa: E402
from lg.models.attention import attention_weights  # noqa: E402


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=TRANSFORMERS, default=TRANSFORMERS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each (default 9)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/attention.json"))
    args = parser.parse_args()
    device = select_device(args.device)
    print(
        f"Seconds per training step, batches of {args.batch_size} at 224 pixels on {device}, "
        f"median of {args.repeats} (quartiles)\n"
        f"{'model':<12}{'ours':>8}{'':<18}{'naive':>8}{'':<18}{'ours/naive':>10}"
    )
    rows = []
    for name in args.models:
        row = compare(name, device=device, batch_size=args.batch_size, repeats=args.repeats)
        rows.append(row)
        print(
            f"{name:<12}{row['ours']:>8.3f}{spread(row['ours_all']):<18}{row['naive']:>8.3f}"
            f"{spread(row['naive_all']):<18}{row['ratio']:>10.3f}",
            flush=True,
        )
    write_json(args.out, device=device.type, batch_size=args.batch_size, rows=rows)


def spread(seconds: list[float]) -> str:
    """Return the quartiles, for a table."""
    low, _, high = quantiles(seconds, n=4)
    return f" ({low:.3f}-{high:.3f})"


def compare(name: str, *, device: torch.device, batch_size: int, repeats: int) -> dict[str, Any]:
    """Time steps of a model and of its unfused copy, in turn."""
    torch.manual_seed(0)
    ours = lg.build_model(lg.load_config(config_path(name, "c100", "base"))).to(device).train()
    naive = timms_convit(ours) if name == "convit-ti" else copy.deepcopy(ours)
    naive_step = naive_attention()(make_step(naive, batch_size))
    steps = {"ours": make_step(ours, batch_size), "naive": naive_step}
    times = alternate(steps, repeats=repeats, device=device)
    ours_s, naive_s = median(times["ours"]), median(times["naive"])
    return {
        "model": name,
        "ours": ours_s,
        "naive": naive_s,
        "ratio": ours_s / naive_s,
        "ours_all": times["ours"],
        "naive_all": times["naive"],
    }


def alternate(
    steps: dict[str, Callable[[], None]], *, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Run steps in turn, twice more to warm up, and return the seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(2 + repeats):
        for name, step in steps.items():
            synchronize(device)
            started = time.perf_counter()
            step()
            synchronize(device)
            if repeat >= 2:
                times[name].append(time.perf_counter() - started)
    return times


def make_step(
    model: torch.nn.Module, batch_size: int, *, size: int = 224, precision: Precision | None = None
) -> Callable[[], None]:
    """Return a training step on a fixed batch of images of `size` pixels."""
    device = next(model.parameters()).device
    precision = precision or Precision(device)
    images = torch.randn(batch_size, 3, size, size, device=device)
    labels = torch.arange(batch_size, device=device)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    def step() -> None:
        with precision.autocast():
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


@contextlib.contextmanager
def naive_attention() -> Iterator[None]:
    """Replace fused attention by explicit matrices inside the `with` block."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any
    ) -> torch.Tensor:
        assert not settings.pop("dropout_p", 0), "the two would drop different weights"
        return attention_weights(query, key, value, **settings) @ value

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


def timms_convit(ours: torch.nn.Module) -> torch.nn.Module:
    """Return timm's ConViT-Tiny with the same weights."""
    model = timm.create_model("convit_tiny", num_classes=100, drop_path_rate=0.1)
    model.load_state_dict(lg.published_state_dict(ours))
    return model.to(next(ours.parameters()).device).train()


if __name__ == "__main__":
    main()
