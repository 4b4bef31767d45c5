#!/usr/bin/env python3
"""Train, test or inspect the model that a config describes.

python run_net.py --mode train --cfg configs/digits/vit_digits_base.yaml
python run_net.py --mode train --seeds 1 2 3 --cfg configs/digits/vit_digits_base.yaml
python run_net.py --mode sweep --trials 20 --cfg FILE TRAIN.VAL_FRACTION 0.2 \\
    OPTIM.BASE_LR log:1e-4:1e-2 DISTILLATION.INTER_WEIGHT 1,2.5,5
python run_net.py --mode test  --cfg configs/digits/vit_digits_base.yaml TEST.PER_CLASS True
python run_net.py --mode predict --images a.jpg photos/ TEST.WEIGHTS work_dirs/RUN/model.pyth
python run_net.py --mode export --format onnx TEST.WEIGHTS work_dirs/RUN/model.pyth
python run_net.py --mode time  --cfg configs/deit/deit-ti_c100_base.yaml DEVICE cpu
python run_net.py --mode info  --cfg configs/pvt/pvt-ti_c100_ours.yaml
python run_net.py --mode doctor --cfg configs/digits/vit_digits_ours.yaml
python run_net.py --mode init --data my_images
python run_net.py --mode pipeline --plain --cfg configs/digits/vit_digits_ours.yaml
python run_net.py --mode report work_dirs/vit_digits_base work_dirs/vit_digits_ours
"""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lg.errors import StuckError, UserError

if TYPE_CHECKING:  # torch is imported by the functions that need it, so that --help is fast
    from yacs.config import CfgNode

Arguments = Mapping[str, dict[str, Any]]  # name -> options of `add_argument`


class Mode(NamedTuple):
    """What a mode does and takes.

    Attributes:
        help: One line for --help.
        function: MODULE:FUNCTION that runs it.
        config: What the function gets of --cfg FILE KEY VALUE ...: loaded: the config; path: `path`
            and `opts`, the KEY VALUE list; overrides: `opts`, without --cfg; none: neither.
        arguments: Those of this mode alone, which the function gets by keyword.
        launched: Whether NUM_GPUS processes run it.
        trains: Whether the function also gets `train`, a picklable function that trains a config.
        from_weights: Whether --cfg may be left out where TEST.WEIGHTS holds its own config.
    """

    help: str
    function: str
    config: Literal["loaded", "path", "overrides", "none"] = "loaded"
    arguments: Arguments | None = None
    launched: bool = False
    trains: bool = False
    from_weights: bool = False


_SEEDS: Arguments = {
    "--seeds": dict(
        nargs="+",
        type=int,
        default=[],
        metavar="SEED",
        help="train once per RNG_SEED, in OUT_DIR/seed_N; print means and write OUT_DIR/seeds.json",
    ),
}
_PREDICT: Arguments = {
    "--images": dict(nargs="+", required=True, metavar="PATH", help="files, folders or patterns"),
    "--out": dict(metavar="FILE", help="write the predictions to this .csv or .jsonl file"),
    "--top": dict(type=int, default=3, help="classes to show (default 3)"),
    "--flip": dict(action="store_true", help="average with the mirrored image"),
}
_EXPORT: Arguments = {
    "--format": dict(
        dest="formats",
        nargs="+",
        choices=("onnx", "torch", "timm"),
        default=["onnx"],
        help="one or several (default onnx)",
    ),
    "--out": dict(metavar="FOLDER", help="default: export/ beside the weights"),
    "--images": dict(
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, folders or patterns to check the export with (default: the test images)",
    ),
}
_SWEEP: Arguments = {
    "--trials": dict(
        metavar="N", help="number of trials (default: all combinations of the choices)"
    ),
    "--storage": dict(metavar="URL", help="database for the results (default: a file in OUT_DIR)"),
}
_INIT: Arguments = {
    "--data": dict(required=True, metavar="FOLDER", help="images in class folders"),
    "--model": dict(default="deit-ti", help="the student (default deit-ti)"),
    "--out": dict(metavar="FOLDER", help="folder for the configs (default NAME_configs)"),
    "--minutes": dict(
        type=float,
        default=10,
        help="approximate minutes to train both models on this machine (default 10)",
    ),
}
_PIPELINE: Arguments = {
    "--guide": dict(
        metavar="FILE",
        help="config of the guide (default: named like the folder of TEACHER_WEIGHTS)",
    ),
    "--plain": dict(action="store_true", help="also train without guidance"),
}
_KEYS: Arguments = {
    "pattern": dict(nargs="?", default="", metavar="PATTERN", help="part of a key or its meaning"),
}
_REPORT: Arguments = {
    "out_dirs": dict(nargs="+", metavar="OUT_DIR", help="folders of runs, then overrides for all"),
    "--out": dict(
        metavar="FILE", help="the page to write (default: report.html in the first folder)"
    ),
}
_DOCTOR: Arguments = {
    "--copies": dict(
        metavar="FILE", help="write a CSV file of the training images that a tested split has too"
    ),
}

MODES = {
    "train": Mode(
        "train, resuming from the last checkpoint in OUT_DIR",
        "lg.trainer:train",
        arguments=_SEEDS,
        launched=True,
    ),
    "test": Mode(
        "test TEST.WEIGHTS, by default the best weights in OUT_DIR",
        "lg.trainer:test",
        launched=True,
        from_weights=True,
    ),
    "predict": Mode(
        "classify images with TEST.WEIGHTS",
        "lg.tools.predict:predict",
        arguments=_PREDICT,
        from_weights=True,
    ),
    "export": Mode(
        "write TEST.WEIGHTS for use without this project: ONNX, torch.export or timm",
        "lg.tools.export:export",
        arguments=_EXPORT,
        from_weights=True,
    ),
    "time": Mode(
        "measure the parts of a training step", "lg.tools.timing:time_steps", launched=True
    ),
    "info": Mode(
        "print model size, cost, and which blocks imitate which; needs no data or weights",
        "lg.tools.info:info",
    ),
    "sweep": Mode(
        "search settings: KEY log:LOW:HIGH, KEY lin:LOW:HIGH or KEY A,B,C",
        "lg.tools.sweep.trials:work",
        config="path",
        arguments=_SWEEP,
        launched=True,
    ),
    "init": Mode(
        "write the configs of a guide and a student for a folder of images",
        "lg.tools.init:init",
        config="none",
        arguments=_INIT,
    ),
    "pipeline": Mode(
        "train the guide and the student of a guided config, and compare them",
        "lg.tools.pipeline:pipeline",
        config="path",
        arguments=_PIPELINE,
        trains=True,
    ),
    "keys": Mode(
        "list config keys with defaults and meaning",
        "lg.tools.keys:print_keys",
        config="none",
        arguments=_KEYS,
    ),
    "report": Mode(
        "write one HTML file about runs: curves, mistakes, calibration, attention, cost",
        "lg.tools.report:report",
        config="overrides",
        arguments=_REPORT,
    ),
    "doctor": Mode(
        "check images, labels, guide, memory and disk before training",
        "lg.tools.doctor:doctor",
        arguments=_DOCTOR,
    ),
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line: `mode`, `cfg`, `opts` and the arguments of the mode."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    mode_parser = _parser("run_net.py --mode MODE", help=False)
    name = mode_parser.parse_known_args([w for w in words if w not in ("-h", "--help")])[0].mode
    if name is None or name not in MODES:
        parser = _parser("run_net.py --mode MODE", epilog=_list_modes())
        _add_config(parser, required=False)
        parser.parse_args([word for word in words if word in ("-h", "--help")])  # print help, exit
        near = difflib.get_close_matches(str(name).lower(), MODES, 1, 0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        problem = "--mode is missing" if name is None else f"unknown --mode {name}.{hint}"
        parser.error(f"{problem}\n{_list_modes()}")
    mode = MODES[name]
    parser = _parser(f"run_net.py --mode {name}", description=mode.help)
    for argument, options in (mode.arguments or {}).items():
        parser.add_argument(argument, **options)
    end = len(words)
    if mode.config == "overrides":
        parser.set_defaults(cfg=None, opts=[])
    elif mode.config != "none":
        _add_config(parser, required=not mode.from_weights)
    if mode.config != "none":
        # Found here because an argument that takes several values would take the overrides too.
        end = next((i for i, word in enumerate(words) if _is_key(word)), end)
    late = [word for word in words[end:] if word.startswith("--")]
    if late:
        parser.error(f"{late[0]} comes after the first KEY VALUE: put it before {words[end]}")
    args = parser.parse_args(words[:end])
    if mode.config != "none":
        args.opts += words[end:]
    return args


def _is_key(word: str) -> bool:
    """Tell whether a word is KEY or KEY=VALUE, and no file has this name."""
    from lg.config.defaults import DEFAULTS

    return re.split(r"[.=]", word)[0] in DEFAULTS and not os.path.exists(word)


def _parser(
    prog: str, *, description: str | None = __doc__, epilog: str | None = None, help: bool = True
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=help,
    )
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    return parser


def _add_config(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--cfg", required=required, metavar="FILE", help="a YAML config, see configs/"
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides, such as TRAIN.BATCH_SIZE 64; --mode keys lists every key",
    )


def _list_modes() -> str:
    rows = "\n".join(f"  {name:<8} {mode.help}" for name, mode in MODES.items())
    return f"modes (--mode MODE --help lists the arguments of one):\n{rows}"


def run(mode: str, cfg: CfgNode, **arguments: Any) -> None:
    """Run a mode in this process; report an error and exit with its status."""
    from lg import errors
    from lg.signals import Interrupted

    try:
        pkgutil.resolve_name(MODES[mode].function)(cfg, **arguments)
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


def start(mode: str, cfg: CfgNode, **arguments: Any) -> None:
    """Run a mode: in this process, in one process per GPU, or as a cluster job."""
    launched = MODES[mode].launched
    entry = functools.partial(run, mode, cfg, **arguments)
    if launched and cfg.LAUNCH.MODE != "local":
        from lg.builders import build_resources
        from lg.distributed.cluster import submit

        line = submit(
            entry,
            mode=cfg.LAUNCH.MODE,
            folder=f"{cfg.OUT_DIR}/jobs",
            resources=build_resources(cfg),
            max_retries=cfg.LAUNCH.MAX_RETRY,
        )
        print(line)
        return
    from lg.distributed.launch import launch

    launch(
        entry,
        num_processes=cfg.NUM_GPUS if launched else 1,
        host=cfg.HOST,
        port_range=(cfg.PORT_RANGE[0], cfg.PORT_RANGE[1]),
    )


def dispatch(mode: str, cfg: str | None, opts: Sequence[str], **arguments: Any) -> None:
    """Run a mode with the arguments of the command line."""
    from lg.config import load_config

    train = functools.partial(start, "train")
    if arguments.get("seeds"):
        from lg.tools.seeds import train_seeds

        assert cfg is not None
        train_seeds(cfg, opts, arguments["seeds"], train)
        return
    arguments.pop("seeds", None)
    if mode == "sweep":
        from lg.tools.sweep.trials import prepare

        assert cfg is not None
        prepared = prepare(cfg, opts, **arguments)
        if prepared is not None:
            start(mode, prepared[0], sweep=prepared[1])
        return
    takes = MODES[mode].config
    if takes == "loaded":
        start(mode, load_config(cfg, opts) if cfg else _config_of_weights(opts), **arguments)
        return
    if takes == "path":
        arguments["path"] = cfg
    if takes != "none":
        arguments["opts"] = opts
    if MODES[mode].trains:
        arguments["train"] = train
    pkgutil.resolve_name(MODES[mode].function)(**arguments)


def _config_of_weights(opts: Sequence[str]) -> CfgNode:
    """Load the config that TEST.WEIGHTS holds."""
    from lg.config import load_trained_config
    from lg.errors import ConfigError

    given = dict(zip(opts[::2], opts[1::2], strict=False))
    if "TEST.WEIGHTS" not in given:
        raise ConfigError(
            "Without --cfg, TEST.WEIGHTS must name the weights: add TEST.WEIGHTS and their path, "
            "such as work_dirs/RUN/model.pyth."
        )
    return load_trained_config(given["TEST.WEIGHTS"], opts)


def main() -> None:
    """Run the command line: exit with 1 after an error, 128 + number after a signal."""
    arguments = {"cfg": None, "opts": (), **vars(parse_args())}
    try:
        dispatch(**arguments)
    except (UserError, OSError) as error:
        # Every process that torchrun started gets here; the first one reports the error.
        sys.exit(f"Error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    except KeyboardInterrupt:  # outside training, which handles the signal itself
        sys.exit(130)


if __name__ == "__main__":
    main()
