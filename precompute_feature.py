#!/usr/bin/env python3
"""Compute a guide's feature maps of the training images, once, for training with OFFLINE guidance.

python precompute_feature.py --cfg configs/resnet/r-56_c100.yaml --ckpt model.pyth
python precompute_feature.py --cfg configs/deit/deit-ti_c100_ours_offline.yaml

With the config of a guide, all its stages are stored, for students of --image-size. With a guided
config, exactly what that training needs. A run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lg.errors import ConfigError, UserError

if TYPE_CHECKING:  # torch is imported when there is something to do, so that --help is quick
    from yacs.config import CfgNode

    from lg.guidance.bank_file import Provenance
    from lg.models import Backbone


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between."""
    return [int(part) for part in text.split(",")]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", required=True, metavar="FILE", help="of a guide, or guided")
    parser.add_argument(
        "--ckpt", metavar="FILE", help="the guide's weights (default: where its config puts them)"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="default: FEATURE_FILE, or temp/<config name>.npz"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="of the students to come (default: 224)"
    )
    parser.add_argument(
        "--layers", type=numbers, metavar="I,J,..", help="blocks of the guide (default: all)"
    )
    parser.add_argument(
        "--mirrored",
        action="store_true",
        help="store the maps of the mirrored images too: flips are then exact, at twice the size",
    )
    parser.add_argument(
        "--shifts",
        type=int,
        default=1,
        metavar="K",
        help="store the maps of K x K shifted views of each image: for students trained with "
        "STRONG_AUGMENTATION False, which shifts images by up to an eighth of their side",
    )
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides, as for run_net.py"
    )
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    from lg.config import load_config

    try:
        run(args, load_config(args.cfg, args.opts))
    except (UserError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Compute what the arguments ask for."""
    import numpy as np
    import torch

    from lg import builders
    from lg.augment.recipe import TestTransform
    from lg.augment.view import plain_views
    from lg.datasets.loader import TestSamples, test_loader
    from lg.distributed import World
    from lg.guidance import FrozenTeacher
    from lg.guidance.bank_file import Provenance
    from lg.guidance.precompute import Progress, check_space, precompute
    from lg.models.published import weights_hash
    from lg.models.taps import map_shapes

    model, facts, path = choose(args, cfg)
    device = builders.build_device(cfg, World())
    dataset = builders.build_train_data(cfg)
    layers, size = facts["layers"], facts["guide_image_size"]
    try:
        views = plain_views(facts["image_size"], shifts=args.shifts, mirrored=args.mirrored)
    except ValueError as error:
        raise ConfigError(f"--shifts: {error}") from None
    guide = FrozenTeacher(model, indices=layers, image_size=size)
    shapes = map_shapes(model, layers, image_size=size, in_channels=cfg.MODEL.IN_CHANNELS)
    provenance = Provenance(
        weights=weights_hash(model),
        shapes=[list(shape) for shape in shapes],
        dtype=args.dtype,
        views=[list(map(float, view)) for view in views],
        versions={"python": platform.python_version(), "torch": torch.__version__}
        | {"numpy": np.__version__},
        **facts,
        **builders.dataset_facts(dataset),
    )
    print(check_space(path, provenance, len(dataset)), flush=True)
    if text := advice(cfg, provenance, len(dataset)):
        print(text, flush=True)
    samples = TestSamples(dataset, TestTransform(image_size=facts["image_size"]))
    with Progress(len(dataset)) as progress:
        precompute(
            guide.to(device),
            lambda done: test_loader(
                samples,
                batch_size=cfg.TEST.BATCH_SIZE,
                num_workers=cfg.DATA_LOADER.NUM_WORKERS,
                pin_memory=cfg.DATA_LOADER.PIN_MEMORY,
                first=done,
            ),
            path=path,
            provenance=provenance,
            indices=dataset.indices,
            device=device,
            say=progress.say,
            advance=progress.advance,
        )
    print(f"Wrote {path}: {path.stat().st_size / 1e9:.2f} GB, maps of {len(dataset):,} images.")


def advice(cfg: CfgNode, provenance: Provenance, count: int) -> str:
    """For guided training with the plain recipe: what would make replayed maps exact."""
    from dataclasses import replace

    from lg.augment.view import padding, plain_views
    from lg.guidance.precompute import bank_size

    if not cfg.DISTILLATION.ENABLE_INTER or cfg.TRAIN.STRONG_AUGMENTATION:
        return ""
    size, flips = provenance.image_size, cfg.TRAIN.HFLIP > 0
    shifts = 2 * padding(size) + 1
    views = plain_views(size, shifts=shifts, mirrored=flips)
    if len(provenance.views) >= len(views):
        return ""
    whole = bank_size(replace(provenance, views=[list(view) for view in views]), count)
    return (
        f"This training draws {len(views)} views of each image, of which {len(provenance.views)} "
        f"are stored; maps of the others will be approximate. --shifts {shifts}"
        f"{' --mirrored' if flips else ''} stores them all, in {whole / 1e9:.2f} GB."
    )


def choose(args: argparse.Namespace, cfg: CfgNode) -> tuple[Backbone, dict[str, Any], Path]:
    """The guide with its weights, what the config says about the bank, and where it goes."""
    from lg import builders
    from lg.checkpoint import load_weights

    options = cfg.DISTILLATION
    if options.ENABLE_INTER:
        if args.image_size or args.layers:
            raise ConfigError(
                "--image-size and --layers are said by a guided config: leave them out, or give "
                "the config of the guide"
            )
        if args.ckpt:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.DISTILLATION.TEACHER_WEIGHTS = args.ckpt
        if not cfg.DISTILLATION.TEACHER_WEIGHTS:
            raise ConfigError("DISTILLATION.TEACHER_WEIGHTS is null: give --ckpt")
        model, kind = builders.build_teacher(cfg), options.TEACHER_MODEL
        layers = list(options.INTER_TEACHER_INDEX)
        sizes = {"image_size": cfg.MODEL.IMG_SIZE, "guide_image_size": options.TEACHER_IMG_SIZE}
    else:
        model, kind = builders.build_model(cfg, pretrained=False), cfg.MODEL.TYPE
        load_weights(model, args.ckpt or f"{cfg.OUT_DIR}/model.pyth", cache=cfg.DOWNLOAD_CACHE)
        layers = args.layers or list(range(len(model.blocks)))
        sizes = {"image_size": args.image_size or 224, "guide_image_size": cfg.MODEL.IMG_SIZE}
        if max(layers) >= len(model.blocks) or min(layers) < 0:
            raise ConfigError(
                f"--layers {layers}: the guide has blocks 0 to {len(model.blocks) - 1}"
            )
    name = f"temp/{Path(args.cfg).stem}.npz"
    path = Path(args.out or options.FEATURE_FILE or name).expanduser()
    return model, {"guide": builders.guide_name(cfg, kind), "layers": layers, **sizes}, path


if __name__ == "__main__":
    main()
