#!/usr/bin/env python3
"""Time training steps in fp32 against bf16, for every family and the ResNet-56 guide.

    python benchmarks/precision.py                     # about six minutes on two cores
    python benchmarks/precision.py --models deit-ti r-56 --repeats 20

Steps (forward, cross-entropy, backward, AdamW) of copies of one model alternate in one process:

    plain     fp32, as PyTorch computes the model by default
    fp32      as trained: CNNs with narrow convolutions in channels_last on CPUs
    bf16      TRAIN.MIXED_PRECISION True: the same, and attention that is not fused on CPUs

Prints a table and writes precision.json.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lg  # noqa: E402
from benchmarks.attention import alternate, make_step  # noqa: E402
from benchmarks.report import TRANSFORMERS, config_path, make_parser, write_json  # noqa: E402
from lg.builders import place_model  # noqa: E402
from lg.device import Precision, select_device  # noqa: E402

MODELS = (*TRANSFORMERS, "r-56")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each (default 9)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/precision.json"))
    args = parser.parse_args()
    device = select_device(args.device)
    print(f"Images per second, medians of {args.repeats} steps on {device}")
    print(f"{'model':<12}{'plain':>8}{'fp32':>8}{'bf16':>8}{'bf16/plain':>12}")
    rows = []
    for name in args.models:
        row = compare(name, device=device, batch_size=args.batch_size, repeats=args.repeats)
        rows.append({"model": name, **row})
        print(
            f"{name:<12}{row['plain']:>8.1f}{row['fp32']:>8.1f}{row['bf16']:>8.1f}"
            f"{row['ratio']:>12.2f}",
            flush=True,
        )
    write_json(args.out, device=device.type, batch_size=args.batch_size, rows=rows)


def compare(name: str, *, device: torch.device, batch_size: int, repeats: int) -> dict[str, Any]:
    """Return the images per second of each variant, and bf16 over plain."""
    torch.manual_seed(0)
    cfg = lg.load_config(config_path(name, "flowers", "base"))
    model, size = lg.build_model(cfg), cfg.MODEL.IMG_SIZE
    batch_size *= 4 if size < 64 else 1
    full, mixed = (Precision(device, mixed=mixed, dtype="bf16") for mixed in (False, True))
    steps = {}
    for variant, precision in (("plain", full), ("fp32", full), ("bf16", mixed)):
        net = copy.deepcopy(model).to(device).train()
        if variant != "plain":
            place_model(net, precision)
        steps[variant] = make_step(net, batch_size, size=size, precision=precision)
    times = alternate(steps, repeats=repeats, device=device)
    rates = {variant: batch_size / median(seconds) for variant, seconds in times.items()}
    return {**rates, "ratio": rates["bf16"] / rates["plain"], "seconds": times}


if __name__ == "__main__":
    main()
