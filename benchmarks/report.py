"""What the benchmarks share: the published models, the command line and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# DeiT-Ti comes first because the goal is its speed.
TRANSFORMERS = ("deit-ti", "t2t-7", "pit-ti", "pvt-ti", "pvtv2-b0", "convit-ti", "cvt-13")


def config_path(name: str, data: str, kind: str) -> Path:
    """Return the config of a published model; those of CNNs (r-56) have no kind (base, ours)."""
    if name.startswith("r-"):
        return ROOT / f"configs/resnet/{name}_{data}.yaml"
    return ROOT / f"configs/{name.partition('-')[0]}/{name}_{data}_{kind}.yaml"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows a script's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def write_json(path: Path, **results: Any) -> None:
    """Write results with the hardware and the versions they were measured with."""
    import timm
    import torch

    on_gpu = torch.cuda.is_available()
    setting = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setting": setting, **results}, indent=1, default=float))
