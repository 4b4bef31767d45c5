"""`--mode doctor`, step by step: output, device, model, data, first training steps.

Each step reports what it finds and lets the others run. Nothing is left on disk.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import warnings
from collections.abc import Callable

import torch
from yacs.config import CfgNode

from lg.builders.data import (
    check_batch_size,
    check_num_classes,
    check_same_classes,
    dataset_facts,
)
from lg.builders.guides import build_teacher, guide_notes
from lg.builders.models import build_guided, build_model
from lg.builders.run import build_run
from lg.builders.splits import (
    Splits,
    check_validation,
    exclusion_line,
    has_test_split,
    has_val_split,
    list_test_data,
    list_train_data,
    list_val_data,
)
from lg.builders.training import (
    build_device,
    build_precision,
    check_training,
    check_world,
    precision_note,
)
from lg.checkpoint import CheckpointFolder, load_weights, read_checkpoint
from lg.config import is_guided, with_values
from lg.datasets.base import EMPTY_CLASS, MISSING, UNTRAINED_CLASS, ImageDataset
from lg.datasets.exclusion import image_names
from lg.datasets.loader import usable_workers
from lg.datasets.scan import drop_unreadable, scan
from lg.distributed import World
from lg.errors import memory_advice
from lg.files.lock import check_writable
from lg.guidance import FeatureBank
from lg.guidance.bank_file import bank_path
from lg.logs.log import RunLog
from lg.paths import is_local_file, is_url
from lg.run import Run, check_fresh, restore_last
from lg.tools.doctor import images, trial
from lg.tools.doctor.findings import (
    COST,
    DATA,
    DEVICE,
    FACT,
    MODEL,
    NOTE,
    OUTPUT,
    PROBLEM,
    Finding,
    Findings,
    format_findings,
)
from lg.tools.doctor.recipe import check_recipe
from lg.tools.info import describe_config

_NAMES = {"TRAIN": "training", "VAL": "validation", "TEST": "test"}


def doctor(cfg: CfgNode, copies: str | None = None) -> None:
    """Print what would stop a config's training or spoil its result; exit with 1 on a problem.

    Args:
        cfg: The config.
        copies: CSV file to write, with the training images that are in a tested split too.
    """
    found = check_config(cfg)
    print("\n".join(format_findings(found)))
    if copies is not None:
        print(images.write_leaks(os.path.expanduser(copies), found.copies))
    if found.has_problem():
        sys.exit(1)


def check_config(cfg: CfgNode) -> Findings:
    """Find what would stop a config's training, spoil its result, or look odd."""
    found = Findings()
    found.memory_advice = memory_advice(
        batch_size=cfg.TRAIN.BATCH_SIZE,
        accum_steps=cfg.TRAIN.ACCUM_STEPS,
        test_batch_size=cfg.TEST.BATCH_SIZE,
        mixed=cfg.TRAIN.MIXED_PRECISION,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the findings cover them
        _check_output(cfg, found)
        _check_device(cfg, found)
        _check_model(cfg, found)
        data = _check_data(cfg, found)
        if "TRAIN" in data:
            _check_bank(cfg, data["TRAIN"], found)
        blocked = found.has_problem(DEVICE, MODEL)
        if not blocked and data.keys() == _roles(cfg).keys():
            found.add(
                *check_recipe(
                    strong=cfg.TRAIN.STRONG_AUGMENTATION,
                    max_epoch=cfg.OPTIM.MAX_EPOCH,
                    batch_size=cfg.TRAIN.BATCH_SIZE,
                    num_train=len(data["TRAIN"]),
                )
            )
            _check_run(cfg, _describe_protocol(data, found), found)
        else:
            topic = "model, guide or device" if blocked else "data"
            text = f"not measured because of problems with {topic}: fix them and run this again."
            found.add(Finding(NOTE, COST, text))
    return found


def _check_output(cfg: CfgNode, found: Findings) -> None:
    """Check that the run's folder is writable, and new if it has to be."""
    with found.catch(OUTPUT, "writing to OUT_DIR"):
        check_writable(cfg.OUT_DIR)
        if not cfg.TRAIN.AUTO_RESUME:
            check_fresh(CheckpointFolder(cfg.OUT_DIR))


def _check_device(cfg: CfgNode, found: Findings) -> None:
    """Check that there is a device for each process, and report device and precision."""
    workers = cfg.DATA_LOADER.NUM_WORKERS
    with found.catch(DEVICE, "selecting the device"):
        build_device(cfg, World(local_rank=cfg.NUM_GPUS - 1))  # the last process needs a GPU too
        device = build_device(cfg, World())
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        precision = build_precision(cfg, device)
        text = (
            f"{name} (DEVICE {cfg.DEVICE}), {precision} (TRAIN.MIXED_PRECISION "
            f"{cfg.TRAIN.MIXED_PRECISION}), images read in parallel: "
            f"{usable_workers(workers) or 1} (DATA_LOADER.NUM_WORKERS {workers})."
        )
        found.add(Finding(FACT, DEVICE, text))
        if note := precision_note(cfg, precision):
            found.add(Finding(NOTE, DEVICE, note))
        if device.type == "cpu" and cfg.DEVICE == "auto":
            text = "no GPU found: training runs on the CPU (set DEVICE cpu to silence this)."
            found.add(Finding(NOTE, DEVICE, text))
        check_world(cfg, World(size=cfg.NUM_GPUS))


def _check_model(cfg: CfgNode, found: Findings) -> None:
    """Check student, guide and taps, and the weights that training reads."""
    options = cfg.DISTILLATION
    with found.catch(MODEL, "checking the settings"):
        check_training(cfg)
    with found.catch(MODEL, "building the model"):
        lines = describe_config(cfg)
        for line in lines[: lines.index("")]:  # the table of blocks follows
            found.add(Finding(FACT, MODEL, f"{line}."))
        if options.ENABLE_INTER and options.INTER_STUDENT_INDEX != "mix":
            taps = zip(options.INTER_STUDENT_INDEX, options.INTER_TEACHER_INDEX, strict=True)
            pairs = ", ".join(f"block {mine} imitates stage {theirs}" for mine, theirs in taps)
            text = f"Guidance: {pairs} of the guide (--mode info shows them)."
            found.add(Finding(FACT, MODEL, text))
    if _exists(cfg.TRAIN.WEIGHTS):
        with found.catch(MODEL, "loading weights", key="TRAIN.WEIGHTS"):
            model = build_model(cfg, pretrained=False)
            load_weights(model, cfg.TRAIN.WEIGHTS, cache=cfg.DOWNLOAD_CACHE, any_size=True)
    if _exists(cfg.MODEL.PRETRAINED):
        with found.catch(MODEL, "loading weights", key="MODEL.PRETRAINED"):
            build_model(cfg)
    if is_guided(cfg) and not options.OFFLINE and _exists(options.TEACHER_WEIGHTS):
        with found.catch(MODEL, "loading weights", key="DISTILLATION.TEACHER_WEIGHTS"):
            build_teacher(cfg)
            _check_guide(cfg, options.TEACHER_WEIGHTS, found)


def _check_guide(cfg: CfgNode, path: str, found: Findings) -> None:
    """Report the guide's test error and its images, as far as its file names them."""
    state = read_checkpoint(path, cache=cfg.DOWNLOAD_CACHE)
    errors = [state[k] for k in ("test_err", "ema_err") if isinstance(state.get(k), (int, float))]
    chance = 100 * (1 - 1 / cfg.MODEL.NUM_CLASSES)
    if errors and math.isfinite(min(errors)):
        text = f"the guide's test error is {min(errors):.1f} % ({path})"
        if is_weak := min(errors) > 0.9 * chance:
            text += f", where guessing gives {chance:.1f} %: train the guide first"
        found.add(Finding(NOTE if is_weak else FACT, MODEL, f"{text}."))
    found.add(*(Finding(NOTE, MODEL, f"{note}.") for note in guide_notes(cfg)))


def _check_data(cfg: CfgNode, found: Findings) -> dict[str, ImageDataset]:
    """Check the images; return the sets that training can use, under TRAIN, VAL and TEST."""
    listed: dict[str, ImageDataset] = {}
    if not cfg.TRAIN.DATASET:
        return listed  # already a problem
    has_empty_class = False
    with found.catch(DATA, "checking the splits"):
        check_validation(cfg)
    for role, list_data in _roles(cfg).items():
        with found.catch(DATA, "listing the images"):
            dataset = list_data(cfg, tolerate=(MISSING, EMPTY_CLASS, UNTRAINED_CLASS))
            listed[role] = dataset
            found.add(*(Finding(NOTE, DATA, f"{note}.") for note in dataset.notes))
            if role == "TRAIN" and (line := exclusion_line(cfg, dataset)):
                found.add(Finding(FACT, DATA, line))
            for fault in dataset.faults:
                has_empty_class |= fault.kind == EMPTY_CLASS
                if fault.kind != MISSING:  # missing files are counted as unreadable
                    found.add(Finding(PROBLEM, DATA, fault.text))
    with found.catch(DATA, "comparing the classes"):
        for dataset in listed.values():
            check_same_classes(listed.get("TRAIN", dataset), dataset)
        for role, dataset in listed.items():
            if not has_empty_class:  # fixing that changes the number of classes
                check_num_classes(cfg, dataset, "TRAIN" if role == "TRAIN" else "TEST")
    is_usable = not found.has_problem(DATA)
    splits = {role: _scan(cfg, dataset, _NAMES[role]) for role, dataset in listed.items()}
    _check_images(cfg, splits, found)
    usable = {}
    for role, dataset in listed.items():
        unreadable = {i: image.fault for i, image in enumerate(splits[role].images) if image.fault}
        with found.catch(DATA, "counting the images"):
            readable = drop_unreadable(dataset, unreadable)
            if role == "TRAIN":
                check_batch_size(cfg, readable)
            if is_usable and (cfg.DATA_LOADER.ON_ERROR == "skip" or not unreadable):
                usable[role] = readable
    return usable


def _roles(cfg: CfgNode) -> dict[str, Callable[..., ImageDataset]]:
    """Return the functions that list the splits of a training: TRAIN, and VAL, TEST or both."""
    roles: dict[str, Callable[..., ImageDataset]] = {"TRAIN": list_train_data}
    roles |= {"VAL": list_val_data} if has_val_split(cfg) else {}
    return roles | ({"TEST": list_test_data} if has_test_split(cfg) else {})


def _describe_protocol(data: dict[str, ImageDataset], found: Findings) -> Splits:
    """Report what each split is for, and return the splits."""
    tested, final = data.get("VAL", data.get("TEST")), data.get("TEST") if "VAL" in data else None
    assert tested is not None
    if final is not None:
        use = f"chooses the best epoch, and {final} is tested once, at the end, with its weights"
    elif "VAL" in data:
        use = "chooses the best epoch, and there is no test set: its best accuracy is optimistic"
    else:
        use = (
            "is tested during training and chooses the best epoch, so its best accuracy is "
            "optimistic (TRAIN.VAL_FRACTION 0)"
        )
    found.add(Finding(FACT, DATA, f"{tested} {use}."))
    return Splits(data["TRAIN"], tested, final)


def _scan(cfg: CfgNode, dataset: ImageDataset, role: str) -> images.Split:
    threads = usable_workers(cfg.DATA_LOADER.NUM_WORKERS)
    return images.Split(
        role=role,
        name=str(dataset),
        class_names=dataset.class_names,
        labels=dataset.labels,
        places=[dataset.describe(position) for position in range(len(dataset))],
        names=image_names(dataset, cfg.DATA_LOADER.ROOT),
        images=scan(dataset, num_threads=threads),
        is_own=dataset.name == "image_folder",
    )


def _check_images(cfg: CfgNode, splits: dict[str, images.Split], found: Findings) -> None:
    for split in splits.values():
        found.add(images.summarize(split))
        found.add(*images.find_unreadable(split, skip=cfg.DATA_LOADER.ON_ERROR == "skip"))
        found.add(*images.find_copies(split), *images.find_oddities(split))
    if "TRAIN" not in splits:
        return
    train = splits["TRAIN"]
    found.add(*images.find_imbalance(train, balance=cfg.TRAIN.BALANCE))
    for test in (split for role, split in splits.items() if role != "TRAIN"):
        if train.name == test.name:
            text = (
                f"TEST.SPLIT is {cfg.TEST.SPLIT}, which tests on training images: set it to test."
            )
            found.add(Finding(NOTE, DATA, text))
        elif train.class_names == test.class_names:
            found.add(*images.find_class_gaps(train, test), *images.find_leaks(train, test))
            found.copies += images.list_leaks(train, test)
    if cfg.TRAIN.VAL_FRACTION > 0 and {"VAL", "TEST"} <= splits.keys():
        # Leaving images out changes which are held out; a held-out image may become a training one.
        held_out, test = splits["VAL"], splits["TEST"]
        found.add(*images.find_leaks(held_out, test))
        found.copies += images.list_leaks(held_out, test)


def _check_bank(cfg: CfgNode, train: ImageDataset, found: Findings) -> None:
    """Check that stored features belong to the guide and the training images."""
    path = cfg.DISTILLATION.FEATURE_FILE
    if cfg.DISTILLATION.OFFLINE and bank_path(path).exists():
        with found.catch(MODEL, "opening the file", key="DISTILLATION.FEATURE_FILE"):
            bank = build_guided(cfg)[1]
            assert isinstance(bank, FeatureBank)
            bank.check(indices=train.indices, shapes=bank.shapes, **dataset_facts(train))
            text = f"{path} holds the guide's maps of the training images."
            found.add(Finding(FACT, MODEL, text))


def _check_run(cfg: CfgNode, data: Splits, found: Findings) -> None:
    """Build one process's share of the training and take its first steps."""
    sections = ("TRAIN", "TEST")
    sizes = {f"{name}.BATCH_SIZE": cfg[name].BATCH_SIZE // cfg.NUM_GPUS for name in sections}
    share = with_values(cfg, sizes)
    run = None
    try:
        with found.catch(COST, "taking the first training steps"):
            run = build_run(share, data, World(), RunLog(cfg.OUT_DIR, enabled=False))
            measured = trial.try_steps(run)
            num_train, num_test = len(data.train), len(data.test)
            found.add(
                *trial.estimate_cost(cfg, measured, run, num_train=num_train, num_test=num_test)
            )
            found.add(trial.estimate_disk(cfg, measured.checkpoint_bytes, run.checkpoints))
        if run is not None:
            _check_resume(cfg, run, found)
    finally:
        if run is not None:
            run.close()
            del run
        gc.collect()  # worker processes end with their loader


def _check_resume(cfg: CfgNode, run: Run, found: Findings) -> None:
    """Load the checkpoint that training would resume from."""
    folder, max_epoch = run.checkpoints.folder, cfg.OPTIM.MAX_EPOCH
    with found.catch(OUTPUT, f"reading the checkpoints in {folder}"):

        def warn(text: str) -> None:
            found.add(Finding(NOTE, OUTPUT, text))

        if not restore_last(run, warn, changed=cfg.TRAIN.RESUME_CHANGED):
            return
        if run.progress.epoch >= max_epoch:
            text = (
                f"{folder} has all {max_epoch} epochs of OPTIM.MAX_EPOCH, so there is nothing left "
                "to train: raise OPTIM.MAX_EPOCH, or set OUT_DIR to a new folder."
            )
        else:
            text = f"training resumes after epoch {run.progress.epoch} of {max_epoch} ({folder})."
        found.add(Finding(NOTE, OUTPUT, text))


def _exists(path: str | None) -> bool:
    return bool(path) and (is_url(str(path)) or is_local_file(str(path)))
