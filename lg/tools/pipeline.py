"""`--mode pipeline`: train the guide of a config and the student, and compare them in one table.

The name of each model's folder ends with a hash of its images and settings, so students share one
guide, and no result is reused after its data or settings change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from lg.builders import build_model, fetch_data, model_name
from lg.config import flatten, is_guided, load_config
from lg.config.defaults import DEFAULT_VALUES, FREE_ON_RESUME
from lg.datasets.base import fingerprint
from lg.distributed import World
from lg.errors import ConfigError
from lg.files.atomic import write_text
from lg.logs.log import epoch_seconds, read_run_lines
from lg.paths import local_path, project_folder
from lg.tools.intervals import wilson_interval
from lg.tools.seeds import read_result

_GUIDE_MODEL = ("CNN.", "RESNET.")
# Overrides of these keys and sections apply to the guide as well.
_SHARED = (
    *("DATA_LOADER.", "DEVICE", "RNG_SEED", "NUM_GPUS", "LOG_", "VERBOSE", "DIST_BACKEND"),
    *("TRAIN.DATASET", "TRAIN.FRACTION", "TRAIN.VAL_FRACTION", "TRAIN.SPLIT_SEED"),
    *("TRAIN.EXCLUDE", "TRAIN.BALANCE", "TRAIN.RESIZE", "TRAIN.HFLIP"),
    *("TEST.", "MODEL.NUM_CLASSES", "MODEL.IN_CHANNELS"),
    *_GUIDE_MODEL,
)
# Keys that determine which images are held out.
_HELD_OUT = ("TRAIN.EXCLUDE", "TRAIN.FRACTION", "TRAIN.VAL_FRACTION", "TRAIN.SPLIT_SEED")
# Keys left out of the hash besides FREE_ON_RESUME: they do not affect the result, or name files
# whose contents are hashed.
_PLACES = (
    *("DATA_LOADER.ROOT", "DATA_LOADER.ON_ERROR", "DEVICE", "DIST_BACKEND"),
    *("DISTILLATION.TEACHER_WEIGHTS", "TRAIN.WEIGHTS", "MODEL.PRETRAINED", "TRAIN.EXCLUDE"),
)
_DONE = "pipeline.json"  # in the folder of a finished training


@dataclass(frozen=True)
class Part:
    """One training of the pipeline.

    Attributes:
        name: guide, plain or guided.
        path: Its config.
        opts: Overrides, without OUT_DIR.
        folder: Of its result.
    """

    name: str
    path: str
    opts: list[str]
    folder: str


def pipeline(
    path: str,
    opts: Sequence[str],
    guide: str | None,
    plain: bool,
    train: Callable[[CfgNode], None],
) -> None:
    """Train the guide, the plain student if asked for, and the guided student; print a table.

    Finished trainings are read, and interrupted ones resumed.

    Args:
        path: The config of the guided student.
        opts: Overrides of the student; those of data, device and seed apply to all. OUT_DIR is the
            folder in which the folders of the trainings are made.
        guide: The config of the guide; None: the one whose OUT_DIR holds TEACHER_WEIGHTS.
        plain: Whether the student is also trained without guidance.
        train: Trains a config.

    Raises:
        ConfigError: There is no student or no guide, or the runs would not run here.
    """
    cfg = load_config(path, opts)
    _check(cfg, path, plain)
    guide_path = guide or find_guide(path, cfg.DISTILLATION.TEACHER_WEIGHTS)
    pairs = [pair for pair in zip(opts[::2], opts[1::2], strict=True) if pair[0] != "OUT_DIR"]
    shared = [part for pair in pairs if pair[0].startswith(_SHARED) for part in pair]
    # The guide must not train on images that the student's file holds out or excludes.
    if cfg.TRAIN.VAL_FRACTION > 0:
        shared += [part for key, value in flatten(cfg) if key in _HELD_OUT for part in (key, value)]
    elif cfg.TRAIN.EXCLUDE and _can_exclude(load_config(guide_path, shared), cfg):
        shared += ["TRAIN.EXCLUDE", cfg.TRAIN.EXCLUDE]
    own = [part for pair in pairs for part in pair]
    own_size = cfg.MODEL.TYPE == "ResNet"  # its keys are those of the guide
    of_guide = ("DISTILLATION.", *(() if own_size else _GUIDE_MODEL))
    bare = [part for pair in pairs if not pair[0].startswith(of_guide) for part in pair]
    parent = cfg.OUT_DIR if "OUT_DIR" in opts[::2] else os.path.dirname(cfg.OUT_DIR)
    first = _part("guide", guide_path, shared, parent)
    guided = ["DISTILLATION.TEACHER_WEIGHTS", os.path.join(first.folder, "model.pyth")]
    parts = [first]
    if plain:
        off = ["DISTILLATION.ENABLE_INTER", "False", "DISTILLATION.ENABLE_LOGIT", "False"]
        parts.append(_part("plain", path, [*bare, *off], parent, suffix="_plain"))
    parts.append(_part("guided", path, [*own, *guided], parent, suffix="", basis=first.folder))
    results = {part.name: run_part(part, train) for part in parts}
    weights = {
        name: os.path.join(result["folder"], "model.pyth") for name, result in results.items()
    }
    places = [f"{name + ' model':<13}{path}" for name, path in weights.items()]
    best = min(results, key=lambda name: results[name]["top1_err"])
    command = "python run_net.py --mode predict --images IMAGES TEST.WEIGHTS"
    last = f"Classify images with the {best} model: {command} {shlex.quote(weights[best])}"
    print("\n".join(["", *table(results), "", *places, "", last]))
    target = os.path.join(parent, f"{Path(path).stem}_pipeline.json")
    write_text(target, json.dumps(results, indent=1))


def _can_exclude(guide: CfgNode, student: CfgNode) -> bool:
    """Return whether a guide without a list of excluded images trains on those of the student."""
    places = {
        (cfg.TRAIN.DATASET, os.path.realpath(cfg.DATA_LOADER.ROOT)) for cfg in (guide, student)
    }
    return len(places) == 1 and not guide.TRAIN.EXCLUDE


def find_guide(path: str, weights: str | None) -> str:
    """Return the config of the guide: named like the folder of its weights, beside the student's
    config or among the configs of the project.

    Raises:
        ConfigError: There is none.
    """
    if not weights:
        raise ConfigError(
            f"DISTILLATION.TEACHER_WEIGHTS of {path} is null: give the config of the guide with "
            "--guide."
        )
    name = f"{Path(weights).parent.name}.yaml"
    beside = Path(path).with_name(name)
    own = sorted((project_folder() / "configs").glob(f"*/{name}"))
    for found in (beside, *own):
        if found.is_file():
            return str(found)
    raise ConfigError(
        f"DISTILLATION.TEACHER_WEIGHTS of {path} is {weights!r}, and there is no config {name} "
        "beside it: give that of the guide with --guide."
    )


def _check(cfg: CfgNode, path: str, plain: bool) -> None:
    """Reject configs without a guide, and runs that would not follow each other here."""
    options = cfg.DISTILLATION
    if not is_guided(cfg):
        raise ConfigError(
            f"{path} is not guided: give the config of a guided model (--plain adds "
            "the model without guidance)."
        )
    if options.OFFLINE:
        raise ConfigError(
            f"DISTILLATION.OFFLINE is True in {path}, but stored features belong to one guide: "
            "give the config without it."
        )
    if plain and cfg.TRAIN.WEIGHTS:
        raise ConfigError(
            f"TRAIN.WEIGHTS is {cfg.TRAIN.WEIGHTS!r}, from which the model without guidance would "
            "start too: leave out --plain, and train it with --mode train from weights of its own."
        )
    if cfg.LAUNCH.MODE != "local" or "RANK" in os.environ:
        raise ConfigError(
            "--mode pipeline trains one model after the other on this machine: set LAUNCH.MODE "
            "local and NUM_GPUS instead of a cluster job or torchrun."
        )


def _part(
    name: str, path: str, opts: list[str], parent: str, *, suffix: str = "", basis: str = ""
) -> Part:
    """Return a training, in a folder that is named after what it learns."""
    cfg = load_config(path, opts)
    ident = settings_hash(cfg, basis)[:8]
    return Part(name, path, opts, os.path.join(parent, f"{Path(path).stem}{suffix}-{ident}"))


def settings_hash(cfg: CfgNode, basis: str = "") -> str:
    """Return a SHA-256 of the images of a training and of all settings that change its result.

    Args:
        cfg: The config.
        basis: What else it depends on: the name of its guide's folder.

    Raises:
        ConfigError: TRAIN.WEIGHTS or MODEL.PRETRAINED cannot be read.
    """
    skipped = (*FREE_ON_RESUME, *_PLACES)
    settings = {
        key: value
        for key, value in flatten(cfg)
        if not key.startswith(skipped) and value != DEFAULT_VALUES[key]
    }
    images = []
    for dataset in filter(None, fetch_data(cfg, World())):
        files = [dataset.describe(index) for index in range(len(dataset))]
        for file in filter(os.path.isfile, files):
            images.append([os.path.relpath(file, cfg.DATA_LOADER.ROOT), os.path.getsize(file)])
        images.append([dataset.indices.tolist(), fingerprint(dataset)])
    parts = [settings, images, os.path.basename(basis)]
    weights = {"TRAIN.WEIGHTS": cfg.TRAIN.WEIGHTS, "MODEL.PRETRAINED": cfg.MODEL.PRETRAINED}
    parts += [_file_hash(key, path, cfg.DOWNLOAD_CACHE) for key, path in weights.items() if path]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _file_hash(key: str, path: str, cache: str) -> str:
    try:
        content = Path(local_path(path, cache=cache)).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{key} is {path!r}, which cannot be read ({error.strerror or error}). Check "
            "the path, or train the model that writes it first."
        ) from None
    return hashlib.sha256(content).hexdigest()


def run_part(part: Part, train: Callable[[CfgNode], None]) -> dict[str, Any]:
    """Train one model, unless its folder has the result, and return the result."""
    done = Path(part.folder, _DONE)
    if done.is_file():
        print(f"The {part.name} model is finished: {part.folder}", flush=True)
        return json.loads(done.read_text(encoding="utf-8"))
    print(f"Training the {part.name} model: {part.folder}", flush=True)
    cfg = load_config(part.path, [*part.opts, "OUT_DIR", part.folder])
    train(cfg)
    seconds = epoch_seconds(read_run_lines(os.path.join(part.folder, "log.txt")))
    model = build_model(cfg, pretrained=False)
    data = fetch_data(cfg, World())
    found = read_result(part.folder, validated=cfg.TRAIN.VAL_FRACTION > 0)
    result = {
        "folder": part.folder,
        "model": model_name(cfg, cfg.MODEL.TYPE),
        "parameters": sum(p.numel() for p in model.parameters()),
        "count": len(data.final or data.test),
        "minutes": round(seconds / 60, 2),
        **found,
    }
    write_text(done, json.dumps(result, indent=1))
    return result


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the table: one row a model, with the 95 % interval of its top-1."""
    last = list(results.values())[-1]
    lines = [
        f"{last['split']}, {last['count']:,} images, {last['choice']}",
        f"{'':<24}{'top-1':>9}  {'95 % interval':<16}{'parameters':>12}{'minutes':>9}",
    ]
    for name, result in results.items():
        hits = round(result["count"] * (1 - result["top1_err"] / 100))
        shown = "{:.1f} to {:.1f} %".format(*wilson_interval(hits, result["count"]))
        lines.append(
            f"{result['model'] + ', ' + name:<24}{100 - result['top1_err']:>7.2f} %  {shown:<16}"
            f"{result['parameters']:>12,}{result['minutes']:>9.1f}"
        )
    return lines
