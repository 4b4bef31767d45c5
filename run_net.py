#!/usr/bin/env python3
"""Train, test or inspect the model that a config describes.

python run_net.py --mode train --cfg configs/digits/vit_digits_base.yaml
python run_net.py --mode train --seeds 1 2 3 --cfg configs/digits/vit_digits_base.yaml
python run_net.py --mode test  --cfg configs/digits/vit_digits_base.yaml TEST.PER_CLASS True
python run_net.py --mode time  --cfg configs/deit/deit-ti_c100_base.yaml DEVICE cpu
python run_net.py --mode info  --cfg configs/pvt/pvt-ti_c100_ours.yaml
python run_net.py --mode doctor --cfg configs/digits/vit_digits_ours.yaml
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from lg.errors import StuckError, UserError

if TYPE_CHECKING:  # torch is imported by the functions that need it, so that --help is fast
    from yacs.config import CfgNode

MODES = {
    "train": "train, resuming from the last checkpoint in OUT_DIR",
    "test": "test TEST.WEIGHTS, by default the best weights in OUT_DIR",
    "time": "measure the parts of a training step",
    "info": "print model size, cost, and which blocks imitate which; needs no data or weights",
    "doctor": "check images, labels, guide, memory and disk before training",
}
_LAUNCHED = ("train", "test", "time")  # modes that run in several processes


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mode",
        required=True,
        choices=tuple(MODES),
        help="; ".join(f"{mode}: {text}" for mode, text in MODES.items()),
    )
    parser.add_argument("--cfg", required=True, metavar="FILE", help="a YAML config, see configs/")
    parser.add_argument(
        "--seeds",
        nargs="+",
        default=[],
        metavar="SEED",
        help="train once per RNG_SEED, in OUT_DIR/seed_N; print means and write OUT_DIR/seeds.json",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides, such as TRAIN.BATCH_SIZE 64; lg/config/defaults.py lists every key",
    )
    args = parser.parse_args(arguments)
    count = next((i for i, text in enumerate(args.seeds) if not text.isdigit()), len(args.seeds))
    args.seeds, args.opts = [*map(int, args.seeds[:count])], args.seeds[count:] + args.opts
    if args.seeds and args.mode != "train":
        parser.error(f"--seeds is for --mode train, not for --mode {args.mode}")
    return args


def run(mode: str, cfg: CfgNode) -> None:
    """Run a mode in this process; report an error and exit with its status."""
    from lg import errors, trainer
    from lg.signals import Interrupted
    from lg.tools.doctor import doctor
    from lg.tools.info import info
    from lg.tools.timing import time_steps

    modes = {
        "train": trainer.train,
        "test": trainer.test,
        "time": time_steps,
        "info": info,
        "doctor": doctor,
    }
    try:
        modes[mode](cfg)
    except Interrupted as stop:
        sys.exit(stop.code)
    except Exception as error:
        errors.report_failure(
            error,
            batch_size=cfg.TRAIN.BATCH_SIZE,
            accum_steps=cfg.TRAIN.ACCUM_STEPS,
            test_batch_size=cfg.TEST.BATCH_SIZE,
            mixed=cfg.TRAIN.MIXED_PRECISION,
        )
        if isinstance(error, StuckError):
            os._exit(1)  # the thread that waits for the image never ends
        sys.exit(1)


def start(mode: str, cfg: CfgNode) -> None:
    """Run a mode: in this process, in one process per GPU, or as a cluster job."""
    if mode in _LAUNCHED and cfg.LAUNCH.MODE != "local":
        from lg.builders import build_resources
        from lg.distributed.cluster import submit

        line = submit(
            run,
            (mode, cfg),
            mode=cfg.LAUNCH.MODE,
            folder=f"{cfg.OUT_DIR}/jobs",
            resources=build_resources(cfg),
            max_retries=cfg.LAUNCH.MAX_RETRY,
        )
        print(line)
        return
    from lg.distributed.launch import launch

    launch(
        run,
        (mode, cfg),
        num_processes=cfg.NUM_GPUS if mode in _LAUNCHED else 1,
        host=cfg.HOST,
        port_range=(cfg.PORT_RANGE[0], cfg.PORT_RANGE[1]),
    )


def main() -> None:
    """Run the command line: exit with 1 after an error, 128 + number after a signal."""
    args = parse_args()
    from lg.config import load_config

    try:
        if args.seeds:
            from lg.tools.seeds import train_seeds

            train_seeds(args.cfg, args.opts, args.seeds, lambda cfg: start("train", cfg))
        else:
            start(args.mode, load_config(args.cfg, args.opts))
    except (UserError, OSError) as error:
        # Every process that torchrun started gets here; the first one reports the error.
        sys.exit(f"Error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    except KeyboardInterrupt:  # outside training, which handles the signal itself
        sys.exit(130)


if __name__ == "__main__":
    main()
