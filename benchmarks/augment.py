#!/usr/bin/env python3
"""Compare batched augmentation with Pillow and timm on real photographs. Print a table.

    python benchmarks/augment.py --dataset cifar100 --image-size 32
    python benchmarks/augment.py --dataset flowers --image-size 224

For random resized crops and every operation of RandAugment, at magnitudes drawn from its
distribution and at the extremes, report the difference from Pillow with the same arguments in grey
levels (0 to 255): the mean absolute difference at the worst magnitude, and the largest difference
of any pixel. Then report the time that augmentation takes per image.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import NAME_TO_OP

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import make_parser  # noqa: E402
from lg.augment.batched import BatchTransform  # noqa: E402
from lg.augment.draws import CROP_UNIFORMS, draw_crops  # noqa: E402
from lg.augment.operations import FILL  # noqa: E402
from lg.augment.randaugment import OPERATIONS, UNIFORMS, Operations, draw, randaugment  # noqa: E402
from lg.augment.resample import crop_and_resize, resize_together  # noqa: E402
from lg.datasets import build_dataset  # noqa: E402

FACTORS = [0.1, 0.19, 1.0, 1.9]
EXTREMES: dict[str, list[float]] = {
    "Rotate": [-30, 30, 0, 1e-3],
    "ShearX": [-0.3, 0.3, 0],
    "ShearY": [-0.3, 0.3, 0],
    "TranslateXRel": [-0.45, 0.45, 0],
    "TranslateYRel": [-0.45, 0.45, 0],
    "PosterizeIncreasing": [1, 2, 3, 4],
    "SolarizeIncreasing": [0, 128, 256],
    "SolarizeAdd": [0, 110],
    "ColorIncreasing": FACTORS,
    "ContrastIncreasing": FACTORS,
    "BrightnessIncreasing": FACTORS,
    "SharpnessIncreasing": FACTORS,
}
WHOLE = ("PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", default="cifar100", help="a dataset of lg (default cifar100)")
    parser.add_argument("--root", default="data", help="folder of the datasets")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=20, help="number of photographs")
    args = parser.parse_args()
    dataset = build_dataset(args.dataset, args.root, "train")
    chosen = np.linspace(0, len(dataset) - 1, args.images).astype(int)
    photographs = [dataset.image(int(position)) for position in chosen]
    rng = np.random.default_rng(0)
    print(f"{'against Pillow, grey levels':<32}{'mean':>9}{'largest':>9}")
    for name, (mean, largest) in {
        **operations(photographs, args.image_size, rng),
        **crops(photographs, args.image_size, rng),
    }.items():
        print(f"{name:<32}{mean:>9.4f}{largest:>9}")
    seconds = cost(photographs, args.image_size)
    print(f"{1e3 * seconds:.2f} ms per image, {torch.get_num_threads()} threads, batches of 32")


def operations(photographs: list, size: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return the mean and largest difference of every operation at its worst magnitude."""
    square = [ImageOps.fit(p, (size, size), Image.Resampling.BICUBIC) for p in photographs]
    images = torch.from_numpy(np.stack(square)).permute(0, 3, 1, 2).contiguous()
    drawn = draw(rng.random((20_000, 1, UNIFORMS)), probability=1.0)
    found = {}
    for number, name in enumerate(OPERATIONS):
        levels = [0.0]
        if name in EXTREMES:
            levels = [*drawn.level[0][drawn.operation[0] == number][:6], *EXTREMES[name]]
        differences = []
        for level in levels:
            shape = 1, len(square)
            everywhere = Operations(np.full(shape, number), np.full(shape, float(level)))
            mine = randaugment(images, everywhere)
            arguments = [int(level) if name in WHOLE else level] if name in EXTREMES else []
            work = NAME_TO_OP[name]
            wanted = [
                np.asarray(work(p, *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC))
                for p in square
            ]
            got = mine.permute(0, 2, 3, 1).numpy().astype(int)
            differences.append(np.abs(got - np.stack(wanted)))
        found[name] = (max(d.mean() for d in differences), max(d.max() for d in differences))
    return found


def crops(photographs: list, size: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return the mean and largest difference of random resized crops, for both resizers."""
    heights, widths = (np.array([getattr(p, n) for p in photographs]) for n in ("height", "width"))
    boxes = draw_crops(heights, widths, rng.random((len(heights), CROP_UNIFORMS)))
    images = [torch.from_numpy(np.array(p)) for p in photographs]
    wanted = [
        np.asarray(p.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC))
        for p, (y, x, h, w) in zip(photographs, boxes.tolist(), strict=True)
    ]
    flip = np.zeros(len(images), dtype=bool)
    ways = {"random resized crop": crop_and_resize(images, boxes, size, flip)}
    if len({image.shape for image in images}) == 1:
        together = resize_together(torch.stack(images), boxes, size, flip)
        ways["random resized crop, as on GPUs"] = together
    found = {}
    for name, mine in ways.items():
        difference = np.abs(mine.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(wanted))
        found[name] = (difference.mean(), difference.max())
    return found


def cost(photographs: list, size: int) -> float:
    """Return the median seconds per image of the strong recipe, decoding not included."""
    transform = BatchTransform(image_size=size, strong=True)
    batch = [photographs[i % len(photographs)] for i in range(32)]
    images = [torch.from_numpy(np.array(transform.prepare(p))) for p in batch]
    seconds = []
    for epoch in range(25):
        started = time.perf_counter()
        transform(images, epochs=[epoch] * len(images), index=range(len(images)))
        seconds.append((time.perf_counter() - started) / len(images))
    return median(seconds[3:])


if __name__ == "__main__":
    main()
