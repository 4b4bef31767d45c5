#!/usr/bin/env python3
"""Train, test, time or look at a model that a config describes.

python run_net.py --mode train --cfg configs/digits/vit_digits_base.yaml
python run_net.py --mode test  --cfg configs/digits/vit_digits_base.yaml TEST.PER_CLASS True
python run_net.py --mode time  --cfg configs/deit/deit-ti_c100_base.yaml DEVICE cpu
python run_net.py --mode info  --cfg configs/pvt/pvt-ti_c100_ours.yaml
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

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
        choices=("train", "test", "time", "info"),
        help="train: from the last checkpoint if there is one; test: TEST.WEIGHTS; time: parts of "
        "a step; info: size, cost, and which blocks imitate what; no data or weights needed",
    )
    parser.add_argument("--cfg", required=True, metavar="FILE", help="a YAML config, see configs/")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides, such as TRAIN.BATCH_SIZE 64; lg/config_defaults.py lists every key",
    )
    return parser.parse_args(arguments)


def run(mode: str, cfg: CfgNode) -> None:
    """What each process does; a fault that a user can mend ends it with one line."""
    from lg import trainer
    from lg.checkpoint import CheckpointError
    from lg.config import ConfigError
    from lg.datasets.base import DataError
    from lg.guidance import BankError
    from lg.metrics import NonFiniteLossError
    from lg.signals import Interrupted

    faults = (BankError, CheckpointError, ConfigError, DataError, NonFiniteLossError, OSError)
    modes = {
        "train": trainer.train,
        "test": trainer.test,
        "time": trainer.time_steps,
        "info": trainer.info,
    }
    try:
        modes[mode](cfg)
    except Interrupted as stop:
        sys.exit(stop.code)
    except faults as error:
        sys.exit(f"Error: {error}")


def main() -> None:
    args = parse_args()
    from lg.config import ConfigError, load_config

    try:
        cfg = load_config(args.cfg, args.opts)
        from lg.distributed import launch

        ports = (cfg.PORT_RANGE[0], cfg.PORT_RANGE[1])
        args_of_run = (args.mode, cfg)
        count = 1 if args.mode == "info" else cfg.NUM_GPUS
        launch(run, args_of_run, num_processes=count, host=cfg.HOST, port_range=ports)
    except (ConfigError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:  # before training took over the signal, or after
        sys.exit(130)


if __name__ == "__main__":
    main()
