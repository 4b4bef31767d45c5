#!/usr/bin/env python3
"""Train, test, time or look at a model that a config describes.

python run_net.py --mode train --cfg configs/digits/vit_digits_base.yaml
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

if TYPE_CHECKING:  # torch is imported when there is something to do, so that --help is quick
    from yacs.config import CfgNode


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mode",
        required=True,
        choices=("train", "test", "time", "info", "doctor"),
        help="train: from the last checkpoint if there is one; test: TEST.WEIGHTS; time: parts of "
        "a step; info: size, cost, and which blocks imitate what; no data or weights needed; "
        "doctor: what would go wrong (images, labels, guide, memory, disk), before it does",
    )
    parser.add_argument("--cfg", required=True, metavar="FILE", help="a YAML config, see configs/")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides, such as TRAIN.BATCH_SIZE 64; lg/config/defaults.py lists every key",
    )
    return parser.parse_args(arguments)


def run(mode: str, cfg: CfgNode) -> None:
    """What each process does; a fault that a user can mend ends it with one line."""
    from lg import errors, trainer
    from lg.signals import Interrupted

    modes = {
        "train": trainer.train,
        "test": trainer.test,
        "time": trainer.time_steps,
        "info": trainer.info,
        "doctor": trainer.doctor,
    }
    try:
        modes[mode](cfg)
    except Interrupted as stop:
        sys.exit(stop.code)
    except Exception as error:
        errors.tell(
            error,
            batch_size=cfg.TRAIN.BATCH_SIZE,
            accum_steps=cfg.TRAIN.ACCUM_STEPS,
            test_batch_size=cfg.TEST.BATCH_SIZE,
            mixed=cfg.TRAIN.MIXED_PRECISION,
        )
        if isinstance(error, StuckError):
            os._exit(1)  # the thread that waits for the image cannot be ended otherwise
        sys.exit(1)


def main() -> None:
    args = parse_args()
    from lg.config import load_config

    try:
        cfg = load_config(args.cfg, args.opts)
        work = (run, (args.mode, cfg))
        if cfg.LAUNCH.MODE != "local" and args.mode in ("train", "test", "time"):
            from lg.builders import build_resources
            from lg.distributed.cluster import submit

            folder, asked = f"{cfg.OUT_DIR}/jobs", build_resources(cfg)
            print(submit(*work, mode=cfg.LAUNCH.MODE, folder=folder, resources=asked))
            return
        from lg.distributed.launch import launch

        ports = (cfg.PORT_RANGE[0], cfg.PORT_RANGE[1])
        count = 1 if args.mode in ("info", "doctor") else cfg.NUM_GPUS
        launch(*work, num_processes=count, host=cfg.HOST, port_range=ports)
    except (UserError, OSError) as error:
        # Under torchrun all processes come here; one says it.
        sys.exit(f"Error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    except KeyboardInterrupt:  # before training took over the signal, or after
        sys.exit(130)


if __name__ == "__main__":
    main()
