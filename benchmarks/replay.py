#!/usr/bin/env python3
"""How far are replayed maps from the teacher's own maps of the same crop? Print a table.

    python benchmarks/replay.py --cfg configs/resnet/r-56_c100.yaml --bank temp/r-56_c100

The bank must hold the maps of the config's teacher on its training set. Each view is replayed from
the stored maps of the whole image and compared with the teacher's maps of that view: the relative
root mean square difference over all images. `in whole cells` replays the box rounded to whole
cells of each map, as the published code does. Writes replay.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lg  # noqa: E402
from benchmarks.report import make_parser, write_json  # noqa: E402
from lg import builders  # noqa: E402
from lg.augment.batched import BatchTestTransform, BatchTransform, normalise  # noqa: E402
from lg.augment.resample import crop_and_resize  # noqa: E402
from lg.augment.view import View  # noqa: E402
from lg.datasets.loader import Samples  # noqa: E402
from lg.distributed import World  # noqa: E402
from lg.guidance import FeatureBank, FrozenTeacher  # noqa: E402
from lg.guidance.replay import replay  # noqa: E402

BATCH = 32


class OnlyCrops(BatchTransform):
    """The strong recipe without changes of the pixels."""

    def apply(self, images: Any, draws: Any) -> Tensor:
        pixels = crop_and_resize(images, draws.box, self.image_size, draws.flip)
        return normalise(pixels, self.mean, self.std)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--cfg", required=True, help="config of the teacher")
    parser.add_argument("--ckpt", help="default: model.pyth in the config's OUT_DIR")
    parser.add_argument("--bank", required=True, type=Path)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/replay.json"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    cfg = lg.load_config(args.cfg, args.opts)
    weights = args.ckpt or f"{cfg.OUT_DIR}/model.pyth"
    cfg = builders.with_trained_statistics(cfg, weights, World())
    model = builders.build_model(cfg)
    lg.load_weights(model, weights)
    layers = list(range(len(model.blocks)))
    teacher = FrozenTeacher(model, indices=layers, image_size=cfg.MODEL.IMG_SIZE)
    bank = FeatureBank(args.bank, layers)
    dataset = builders.build_train_data(cfg)
    builders.prepare_bank(cfg, bank, dataset, torch.device("cpu"))
    assert bank.provenance is not None, "--bank must have a provenance"
    size = bank.provenance.image_size
    facts = vars(builders.build_preprocessing(cfg, training=True)) | {"image_size": size}
    transforms = {
        "whole image": BatchTestTransform(**facts),
        "random resized crop": OnlyCrops(**facts, strong=True),
        "padded crop": BatchTransform(**facts, strong=False),
    }
    rows = np.linspace(0, len(dataset) - 1, args.images).astype(int)
    results = {}
    for name, transform in transforms.items():
        samples = Samples(dataset, transform)
        sums = torch.zeros(3, len(layers), dtype=torch.float64)  # errors of both replays, maps
        for first in tqdm(range(0, len(rows), BATCH), desc=name, leave=False):
            part = rows[first : first + BATCH]
            images, _, index, view = samples.__getitems__([(0, row) for row in part.tolist()])
            online, _ = teacher(images)
            stored, _ = bank(images, index, view)
            whole, _ = bank(images, index, View().tensor().expand(len(part), -1))
            for layer, (theirs, mine, full) in enumerate(zip(online, stored, whole, strict=True)):
                cells = replay(full, in_cells(view, full.shape[2]))
                for row, maps in enumerate((mine - theirs, cells - theirs, theirs)):
                    sums[row, layer] += maps.double().square().sum()
        results[name] = (sums[:2] / sums[2]).sqrt().tolist()
    print(f"{'':<22}" + "".join(f"{model.block_names[i]:>10}" for i in layers))
    for name, (mine, cells) in results.items():
        print(f"{name:<22}" + "".join(f"{100 * x:>9.2f}%" for x in mine))
        if name != "whole image":
            print(f"{'  in whole cells':<22}" + "".join(f"{100 * x:>9.2f}%" for x in cells))
    write_json(args.out, bank=str(args.bank), images=args.images, relative_rms=results)


def in_cells(view: Tensor, side: int) -> Tensor:
    """Round the boxes of views to whole cells of a map."""
    box = (view[:, :4] * side).round()
    box[:, 2:] = box[:, 2:].clamp(min=1)
    return torch.cat([box / side, view[:, 4:]], dim=1)


if __name__ == "__main__":
    main()
