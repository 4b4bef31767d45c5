"""`--mode init`: look at a folder of images, and write the configs of a guide and its student."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from lg.config import load_config
from lg.datasets.image_folder import find_splits
from lg.errors import ConfigError
from lg.files.atomic import write_text
from lg.paths import project_folder
from lg.tools.init.folder import FolderFacts, look
from lg.tools.init.plan import GUIDE_SIDE, MIN_EPOCHS, MIN_STEPS, PATCHES, Length, Plan, make_plan
from lg.tools.init.speed import Speed, measure_speed

_GUIDE = "configs/resnet/r-56_c100.yaml"


def init(data: str, model: str, out: str | None, minutes: float) -> None:
    """Write guide and student configs for a folder of images, and print the commands to run next.

    Args:
        data: The folder.
        model: Name of the student, one of `student_configs`.
        out: Folder of the configs; None: NAME_configs for a folder called NAME.
        minutes: How long both may train on this machine, about.

    Raises:
        ConfigError: There is no such model, or a config exists with other content.
        DataError: The folder holds no images in class folders.
    """
    known = student_configs()
    if model not in known:
        raise ConfigError(f"--model {model} is unknown: choose from {', '.join(known)}.")
    if minutes <= 0:
        raise ConfigError(f"--minutes {minutes:g} must be above 0.")
    name = Path(data).expanduser().resolve().name
    folder = Path(out or f"{name}_configs").expanduser()
    facts = look(data)
    print("\n".join(describe(facts)), flush=True)
    classes = ["MODEL.NUM_CLASSES", len(facts.class_names)]
    print("Measuring the speed of this machine, as if no other program used it ...", flush=True)

    def student_speed(size: int) -> Speed:
        opts = [*classes, *_size_opts(known[model], size)]
        return measure_speed(
            load_config(known[model], [*opts, "DISTILLATION.TEACHER_WEIGHTS", None])
        )

    plan = make_plan(
        facts,
        minutes=minutes,
        student_lr=load_config(known[model]).OPTIM.BASE_LR,
        guide_speed=measure_speed(load_config(_GUIDE, classes)),
        student_speed=student_speed,
    )
    guide, student = folder / f"{name}_guide.yaml", folder / f"{name}_{model}.yaml"
    texts = {guide: render_guide(facts, plan, guide)}
    texts[student] = render_student(facts, plan, student, model, known[model], guide)
    for path, text in texts.items():
        _write(path, text)
        load_config(path)  # cannot fail, unless a rule changes
    print("\n".join(advise(facts, plan, guide, student, minutes=minutes)))


def student_configs() -> dict[str, str]:
    """Return the students that can be planned, by name, with a guided config of each."""
    found = {}
    for path in sorted((project_folder() / "configs").glob("*/*_c100*_ours.yaml")):
        found[path.stem.partition("_")[0]] = str(path)
    return found


def describe(facts: FolderFacts) -> list[str]:
    """Return lines about the images."""
    splits = ", ".join(f"{count:,} in {split}" for split, count in facts.splits.items())
    lines = [f"{_short(facts.root)}: {len(facts.class_names)} classes; images: {splits}."]
    lines.append(
        f"{_range(facts.sizes)} training images per class; the shorter side has about "
        f"{facts.side} pixels."
    )
    lines += facts.notes
    if facts.val_fraction:
        held_out = sum(facts.sizes) - facts.num_train
        test = next((split for split in facts.splits if split != "train"), None)
        use = f"{test}/ is tested once, at the end" if test else "there is no test set"
        lines.append(
            f"{held_out:,} training images are held out to choose the best epoch "
            f"(TRAIN.VAL_FRACTION {facts.val_fraction}); {use}."
        )
    if facts.is_imbalanced:
        lines.append(
            "The classes differ in size, so TRAIN.BALANCE is weights; judge by balanced accuracy."
        )
    if facts.is_unusual:
        lines.append(
            "Brightness or contrast are not those of photographs: DATA_LOADER.NORMALIZE auto."
        )
    if facts.are_symbols:
        lines.append("The class names suggest that mirrored images are wrong: TRAIN.HFLIP 0.")
    return lines


def render_guide(facts: FolderFacts, plan: Plan, path: Path) -> str:
    """Return the text of the guide's config."""
    header = [
        f"The guide for {facts.root.name}: a ResNet-56 on {GUIDE_SIDE}-pixel images.",
        *_header(facts, plan.guide, plan, path),
    ]
    tree = {
        "_BASE_": ["configs/_base_/recipe_cnn.yaml", "configs/_base_/model_r-56.yaml"],
        "MODEL": {"NUM_CLASSES": len(facts.class_names)},
        "OPTIM": {"MAX_EPOCH": plan.guide.epochs, "BASE_LR": plan.guide_lr},
        **_data(facts, plan.guide, plan),
    }
    return _text(header, tree)


def render_student(
    facts: FolderFacts, plan: Plan, path: Path, model: str, source: str, guide: Path
) -> str:
    """Return the text of the student's config.

    Args:
        facts: What the folder holds.
        plan: The settings.
        path: The student's config.
        model: Its name.
        source: A guided config of the same model, for the blocks that are guided.
        guide: The config of its guide.
    """
    size = plan.image_size
    weights = f"work_dirs/{guide.stem}/model.pyth"
    header = [
        f"{model} on {size}-pixel images, guided by {guide.name} (train that first). For the plain",
        "model: DISTILLATION.ENABLE_INTER False and another OUT_DIR.",
        *_header(facts, plan.student, plan, path),
    ]
    opts = _size_opts(source, size)
    transformer = {"TRANSFORMER": {"PATCH_SIZE": PATCHES[size]}} if len(opts) > 2 else {}
    student = plan.student
    tree = {
        "_BASE_": [
            "configs/_base_/recipe_vt.yaml",
            f"configs/_base_/model_{model}.yaml",
            "configs/_base_/guide_r-56.yaml",
        ],
        "MODEL": {"IMG_SIZE": size, "NUM_CLASSES": len(facts.class_names)},
        **transformer,
        "OPTIM": {
            "MAX_EPOCH": student.epochs,
            "BASE_LR": plan.student_lr,
            "MIN_LR": float(f"{plan.student_lr / 100:.2g}"),
            "WARMUP_EPOCHS": student.warmup,
        },
        **_data(facts, student, plan),
        "DISTILLATION": {
            "INTER_STUDENT_INDEX": load_config(source).DISTILLATION.INTER_STUDENT_INDEX,
            "TEACHER_WEIGHTS": weights,
        },
    }
    return _text(header, tree)


def advise(
    facts: FolderFacts, plan: Plan, guide: Path, student: Path, *, minutes: float
) -> list[str]:
    """Return lines about the plan for so many minutes, and the commands to run next."""
    total = plan.guide.minutes + plan.student.minutes
    run = f"python {shlex.quote(_script())} --mode"
    one, two = shlex.quote(str(guide)), shlex.quote(str(student))
    lines = ["", "Written, with the training planned for this machine:"]
    for path, length in ((guide, plan.guide), (student, plan.student)):
        recipe = "strong" if length.strong else "plain"
        lines.append(
            f"  {path}: {length.epochs} epochs of {length.steps} steps of {plan.batch_size} "
            f"images, {recipe} augmentation, about {length.minutes:.0f} min"
        )
    if total > 1.1 * minutes:
        lines.append(
            f"That is more than --minutes {minutes:g}, because fewer than {MIN_EPOCHS} epochs or "
            f"{MIN_STEPS} steps barely train a transformer."
        )
    places = find_splits(facts.root)
    place = places.get("test", places.get("val", facts.root))
    images = shlex.quote(_short(place if place.is_dir() else facts.root))
    lines += [
        "",
        f"Train both (about {total:.0f} min; --plain adds the model without guidance):",
        f"  {run} pipeline --cfg {two}",
        "or one after the other, checking the data first:",
        f"  {run} doctor --cfg {one}",
        f"  {run} train --cfg {one}",
        f"  {run} train --cfg {two}",
        f"  {run} predict --images {images} TEST.WEIGHTS "
        f"work_dirs/{shlex.quote(student.stem)}/model.pyth",
    ]
    return lines


def _size_opts(source: str, size: int) -> list[str]:
    """Return the overrides for a side in pixels; models of one stage get patches to match."""
    opts = ["MODEL.IMG_SIZE", str(size)]
    is_plain = load_config(source).MODEL.TYPE in ("DeiT", "ConViT")
    return [*opts, "TRANSFORMER.PATCH_SIZE", str(PATCHES[size])] if is_plain else opts


def _header(facts: FolderFacts, length: Length, plan: Plan, path: Path) -> list[str]:
    names = ", ".join(facts.class_names)
    return [
        f"  python run_net.py --mode train --cfg {shlex.quote(str(path))}",
        f"{len(facts.class_names)} classes, {_range(facts.sizes)} training images each: {names}",
        f"About {length.minutes:.0f} min on the machine where --mode init wrote this: "
        f"{length.epochs} epochs of {length.steps} steps of {plan.batch_size} images.",
    ]


def _data(facts: FolderFacts, length: Length, plan: Plan) -> dict[str, dict[str, object]]:
    """Return the sections that guide and student share."""
    train: dict[str, object] = {
        "DATASET": "image_folder",
        "BATCH_SIZE": plan.batch_size,
        "STRONG_AUGMENTATION": length.strong,
        "HFLIP": 0.0 if facts.are_symbols else 0.5,
    }
    if facts.val_fraction:
        train["VAL_FRACTION"] = facts.val_fraction
    if facts.is_imbalanced:
        train["BALANCE"] = "weights"
    if length.mixed:
        train["MIXED_PRECISION"] = True
    return {
        "TRAIN": train,
        "TEST": {"SPLIT": "test", "PERIOD": length.test_period},
        "DATA_LOADER": {
            "ROOT": str(facts.root),
            **({"NORMALIZE": "auto"} if facts.is_unusual else {}),
        },
    }


def _text(header: list[str], tree: Mapping[str, object]) -> str:
    """Return a config: comments, and one line a section."""
    lines = [
        f"# {part}"
        for line in header
        for part in textwrap.wrap(line, 110, drop_whitespace=False, break_long_words=False) or [""]
    ]
    for key, value in tree.items():
        flow = yaml.safe_dump(
            value, default_flow_style=True, sort_keys=False, width=110, allow_unicode=True
        )
        lines.append(f"{key}: {flow.strip()}")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a config, unless it exists with other content."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{path} exists and differs from this plan (it was edited, or --minutes or the speed "
            "of the machine has changed): remove it, or give another folder with --out."
        )
    write_text(path, text)


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _short(path: Path) -> str:
    """Return a path as seen from the working directory, if it is below that."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _script() -> str:
    """Return the path of run_net.py as a command that is started here names it."""
    return sys.argv[0] if os.path.basename(sys.argv[0]) == "run_net.py" else "run_net.py"
