#!/usr/bin/env python3
"""Compute a guide's feature maps of the training images once, for training with OFFLINE guidance.

python precompute_feature.py --cfg configs/resnet/r-56_c100.yaml --ckpt model.pyth
python precompute_feature.py --cfg configs/deit/deit-ti_c100_ours_offline.yaml

With the config of a guide, the maps of all its stages are stored, for students of --image-size.
With a guided config, exactly the maps that this training needs. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lg.errors import ConfigError, UserError

if TYPE_CHECKING:  # torch is imported only when there is work to do, so that --help is quick
    from yacs.config import CfgNode

    from lg.augment.preprocessing import Preprocessing
    from lg.guidance.bank_file import Provenance
    from lg.models import Backbone


def block_numbers(text: str) -> list[int]:
    """Parse block numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--cfg", required=True, metavar="FILE", help="config of a guide or of a guided training run"
    )
    add("--ckpt", metavar="FILE", help="the guide's weights (default: those of its config)")
    add("--out", metavar="FOLDER", help="default: FEATURE_FILE, or temp/<config name>")
    add(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the students' images (default: 224)",
    )
    add("--layers", type=block_numbers, metavar="I,J,..", help="blocks of the guide (default: all)")
    add(
        "--mirrored",
        action="store_true",
        help="also store the maps of the mirrored images, at twice the size: flips then add no "
        "error of their own",
    )
    add(
        "--shifts",
        type=int,
        default=1,
        metavar="K",
        help="store the maps of K x K shifted views of each image: for students trained with "
        "STRONG_AUGMENTATION False, which shifts images by up to an eighth of their side",
    )
    add("--dtype", choices=("float16", "float32"), default="float16")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides, as for run_net.py")
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
    """Compute the features that the arguments specify."""
    from lg import builders
    from lg.augment.batched import BatchTestTransform
    from lg.augment.preprocessing import fill_colour
    from lg.datasets.loader import Samples, test_loader
    from lg.distributed import World
    from lg.guidance import FrozenTeacher
    from lg.guidance.bank_file import bank_folder
    from lg.guidance.precompute import check_space, precompute

    path = args.out or cfg.DISTILLATION.FEATURE_FILE or f"temp/{Path(args.cfg).stem}"
    folder = bank_folder(path)
    model, facts, trained = choose_teacher(args, cfg)
    device = builders.build_device(cfg, World())
    dataset = builders.build_train_data(cfg)
    for note in builders.data_notes(dataset):
        print(f"Warning: {note}.", file=sys.stderr, flush=True)
    # The guide sees the student's images, with the same borders, normalised as in its own training.
    seen = trained
    if cfg.DISTILLATION.ENABLE_INTER:
        seen = builders.build_preprocessing(builders.with_data_statistics(cfg, dataset))
    fill = fill_colour(seen.mean)
    facts |= {**builders.dataset_facts(dataset), "resize": cfg.TRAIN.RESIZE}
    facts["fill"] = list(fill) if cfg.TRAIN.RESIZE == "letterbox" else None
    provenance = describe(args, model, facts, in_channels=cfg.MODEL.IN_CHANNELS)
    print(check_space(folder, provenance, len(dataset)), flush=True)
    if text := advice(cfg, provenance, len(dataset)):
        print(text, flush=True)
    transform = BatchTestTransform(
        image_size=provenance.image_size,
        resize=provenance.resize,
        mean=trained.mean,
        std=trained.std,
        fill=fill,
    )
    samples = Samples(dataset, transform)
    precompute(
        FrozenTeacher(
            model, indices=provenance.layers, image_size=provenance.teacher_image_size
        ).to(device),
        lambda done: test_loader(
            samples,
            batch_size=cfg.TEST.BATCH_SIZE,
            num_workers=cfg.DATA_LOADER.NUM_WORKERS,
            pin_memory=cfg.DATA_LOADER.PIN_MEMORY,
            first=done,
            timeout=cfg.DATA_LOADER.TIMEOUT,
        ),
        folder=folder,
        provenance=provenance,
        indices=dataset.indices,
        device=device,
        black=trained.black,
    )
    print(f"Wrote the maps of {len(dataset):,} images to {folder}.")


def choose_teacher(
    args: argparse.Namespace, cfg: CfgNode
) -> tuple[Backbone, dict[str, Any], Preprocessing]:
    """Build the teacher with its weights; return it with what the config adds to the provenance,
    and the preprocessing that it was trained with."""
    from lg import builders
    from lg.checkpoint import BEST_NAME, load_weights
    from lg.config import with_values

    options = cfg.DISTILLATION
    if options.ENABLE_INTER:
        if args.image_size or args.layers:
            raise ConfigError(
                "--image-size and --layers are set by a guided config: drop them, or give the "
                "config of the guide"
            )
        if args.ckpt:
            cfg = with_values(cfg, {"DISTILLATION.TEACHER_WEIGHTS": args.ckpt})
        if not cfg.DISTILLATION.TEACHER_WEIGHTS:
            raise ConfigError("DISTILLATION.TEACHER_WEIGHTS is null: give --ckpt")
        path, kind = cfg.DISTILLATION.TEACHER_WEIGHTS, options.TEACHER_MODEL
        model, saved = builders.load_teacher(cfg)
        layers = list(options.INTER_TEACHER_INDEX)
        sizes = {"image_size": cfg.MODEL.IMG_SIZE, "teacher_image_size": options.TEACHER_IMG_SIZE}
    else:
        model, kind = builders.build_model(cfg, pretrained=False), cfg.MODEL.TYPE
        path = args.ckpt or f"{cfg.OUT_DIR}/{BEST_NAME}"
        saved = load_weights(model, path, cache=cfg.DOWNLOAD_CACHE)
        layers = args.layers or list(range(len(model.blocks)))
        sizes = {"image_size": args.image_size or 224, "teacher_image_size": cfg.MODEL.IMG_SIZE}
        if max(layers) >= len(model.blocks) or min(layers) < 0:
            raise ConfigError(
                f"--layers {layers}: the guide has blocks 0 to {len(model.blocks) - 1}"
            )
    channels = cfg.MODEL.IN_CHANNELS
    trained = builders.guide_preprocessing(saved, path, kind=kind, channels=channels)
    return model, {"teacher": builders.model_name(cfg, kind), "layers": layers, **sizes}, trained


def describe(
    args: argparse.Namespace, model: Backbone, facts: dict[str, Any], *, in_channels: int
) -> Provenance:
    """Return the provenance of the features."""
    import numpy as np
    import torch

    from lg.augment.view import plain_views
    from lg.guidance.bank_file import Provenance
    from lg.models.published import weights_hash
    from lg.models.taps import map_shapes

    try:
        views = plain_views(facts["image_size"], shifts=args.shifts, mirrored=args.mirrored)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None  # "--shifts is 4: ..."
    size = facts["teacher_image_size"]
    shapes = map_shapes(model, facts["layers"], image_size=size, in_channels=in_channels)
    return Provenance(
        **facts,
        weights=weights_hash(model),
        shapes=[list(shape) for shape in shapes],
        dtype=args.dtype,
        views=[list(map(float, view)) for view in views],
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    )


def advice(cfg: CfgNode, provenance: Provenance, num_images: int) -> str:
    """Return how to make replayed maps exact, for a guided training with the plain recipe."""
    from lg.augment.view import padding, plain_views
    from lg.guidance.precompute import bank_size

    if not cfg.DISTILLATION.ENABLE_INTER or cfg.TRAIN.STRONG_AUGMENTATION:
        return ""
    size, flips = provenance.image_size, cfg.TRAIN.HFLIP > 0
    shifts = 2 * padding(size) + 1
    views = plain_views(size, shifts=shifts, mirrored=flips)
    if len(provenance.views) >= len(views):
        return ""
    all_views = replace(provenance, views=[list(view) for view in views])
    return (
        f"This training draws {len(views)} views of each image and {len(provenance.views)} are "
        f"stored; the maps of the others will be approximate. --shifts {shifts}"
        f"{' --mirrored' if flips else ''} stores all of them, in "
        f"{bank_size(all_views, num_images) / 1e9:.2f} GB."
    )


if __name__ == "__main__":
    main()
