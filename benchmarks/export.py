#!/usr/bin/env python3
"""Export the published models to every format, and compare logits on real images.

    python benchmarks/export.py DATA_LOADER.ROOT data            # half an hour on two cores
    python benchmarks/export.py --models pvt-ti --formats onnx

Models get the configs of Flowers at 224 pixels and random weights, also in the classifier, where a
fresh DeiT has zeros. Seconds are CPU time from loading the weights to the end of the check. Prints
a table and writes export.json.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lg  # noqa: E402
from benchmarks.report import TRANSFORMERS, config_path, make_parser, write_json  # noqa: E402
from lg.errors import ConfigError  # noqa: E402
from lg.tools.export import export  # noqa: E402

MODELS = (*TRANSFORMERS, "t2t-14", "r-56")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--formats", nargs="+", default=["onnx", "torch", "timm"])
    parser.add_argument("--out", type=Path, default=Path("work_dirs/export.json"))
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the configs")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| model | format | MB | largest difference | of the spread | same class | CPU seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in args.models:
        for form in args.formats:
            row = export_random(name, form, args.opts)
            if row is None:  # timm does not have the family
                continue
            rows.append({"model": name, "format": form, **row})
            print(
                f"| {name} | {form} | {row['megabytes']:.1f} | {row['difference']:.1e} | "
                f"{row['relative']:.1e} | {row['num_equal']} of {row['count']} | "
                f"{row['seconds']:.0f} |",
                flush=True,
            )
            write_json(args.out, rows=rows)


def export_random(name: str, form: str, opts: list[str]) -> dict[str, Any] | None:
    """Export a model of random weights to one format; None if timm does not have it."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/model.pyth"
        path = config_path(name, "flowers", "base")
        cfg = lg.load_config(path, [*opts, "TEST.WEIGHTS", weights])
        model = lg.build_model(cfg)
        for key, parameter in model.named_parameters():
            if key in model.head_names():
                nn.init.normal_(parameter, std=0.02)
        torch.save(lg.published_state_dict(model), weights)
        try:
            started = time.process_time()
            with contextlib.redirect_stdout(sys.stderr):
                (done,) = export(cfg, formats=[form], out=folder, images=[])
        except ConfigError as error:
            if "timm does not have" not in str(error):
                raise
            return None
        return {
            **vars(done.parity),
            "relative": done.parity.difference / done.parity.spread,
            "megabytes": done.num_bytes / 1e6,
            "seconds": time.process_time() - started,
        }


if __name__ == "__main__":
    main()
