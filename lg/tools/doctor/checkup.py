"""`--mode doctor`: from the config to findings. Goes on after each, and leaves nothing behind."""

from __future__ import annotations

import gc
import math
import shutil
import sys
import warnings
from pathlib import Path

import torch
import yaml
from yacs.config import CfgNode

from lg.builders.data import (
    cached_bytes,
    check_batch_size,
    check_num_classes,
    check_same_classes,
    dataset_facts,
    list_test_data,
    list_train_data,
)
from lg.builders.models import build_guided, build_model, build_teacher
from lg.builders.run import build_run
from lg.builders.training import build_device, build_precision, check_training, check_world
from lg.checkpoint import load_weights, read_checkpoint
from lg.datasets.base import EMPTY_CLASS, MISSING, UNTRAINED_CLASS, ImageDataset
from lg.datasets.cached_loader import CachedTrainLoader
from lg.datasets.loader import usable_workers
from lg.datasets.scan import drop_unreadable, has_image_files, scan
from lg.distributed import World
from lg.errors import CheckpointError
from lg.files.lock import check_writable, existing_folder
from lg.guidance import FeatureBank
from lg.logs.log import RunLog
from lg.paths import is_local_file, is_url
from lg.run import Run
from lg.tools.doctor import findings, trial
from lg.tools.doctor.findings import (
    COST,
    DATA,
    DEVICE,
    FACT,
    MODEL,
    NOTE,
    OUTPUT,
    PROBLEM,
    Record,
    Split,
)
from lg.tools.info import describe_config


def doctor(cfg: CfgNode) -> None:
    """Print what would stop a config's training or spoil its result; exit with 1 if anything."""
    found = check_up(cfg)
    print("\n".join(findings.report(found)))
    if any(each.level == PROBLEM for each in found):
        sys.exit(1)


def check_up(cfg: CfgNode) -> list[findings.Finding]:
    """Everything that would stop the config's training or spoil its result, or looks odd.

    Args:
        cfg: the config.
    """
    record = Record()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the findings say what they would say
        _check_output(cfg, record)
        fine = _check_device(cfg, record)
        fine = _check_model(cfg, record) and fine
        data = _check_data(cfg, record)
        if "TRAIN" in data:
            fine = _check_bank(cfg, data["TRAIN"], record) and fine
        if fine and len(data) == 2:
            _check_run(cfg, (data["TRAIN"], data["TEST"]), record)
        else:
            reason = "the data" if fine else "model, guide or device"
            text = f"not measured, for the problems of {reason}: mend them, then ask again."
            record.add(NOTE, COST, text)
    return record.findings


def _check_output(cfg: CfgNode, record: Record) -> None:
    """Whether the run's folder can be written to."""
    try:
        check_writable(cfg.OUT_DIR)
    except CheckpointError as error:
        record.add(PROBLEM, OUTPUT, str(error))
    checkpoints = Path(cfg.OUT_DIR) / "checkpoints"
    if not cfg.TRAIN.AUTO_RESUME and any(checkpoints.glob("model_epoch_*.pyth")):
        text = f"TRAIN.AUTO_RESUME is False, but {checkpoints} has checkpoints of an earlier run: "
        ways = "set OUT_DIR to another folder, remove them, or set TRAIN.AUTO_RESUME True."
        record.add(PROBLEM, OUTPUT, text + ways)


def _check_device(cfg: CfgNode, record: Record) -> bool:
    before, workers = record.num_problems(), cfg.DATA_LOADER.NUM_WORKERS
    with record.noting(DEVICE, "choosing the device"):
        build_device(cfg, World(local_rank=cfg.NUM_GPUS - 1))  # the last process has a GPU too?
        device = build_device(cfg, World())
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        text = (
            f"{name} (DEVICE {cfg.DEVICE}), {build_precision(cfg, device)} (TRAIN.MIXED_PRECISION "
            f"{cfg.TRAIN.MIXED_PRECISION}), images are read {usable_workers(workers) or 1} at a "
            f"time (DATA_LOADER.NUM_WORKERS {workers})."
        )
        record.add(FACT, DEVICE, text)
        if device.type == "cpu" and cfg.DEVICE == "auto":
            text = "no GPU is found, so it runs on the CPU. DEVICE cpu says that this is wanted."
            record.add(NOTE, DEVICE, text)
        check_world(cfg, World(size=cfg.NUM_GPUS))
    return record.num_problems() == before


def _check_model(cfg: CfgNode, record: Record) -> bool:
    """Student, guide and taps, and the files of weights that training reads."""
    before, options = record.num_problems(), cfg.DISTILLATION
    with record.noting(MODEL, "checking the settings"):
        check_training(cfg)
    with record.noting(MODEL, "building the model"):
        lines = describe_config(cfg)
        for line in lines[: lines.index("")]:  # the table of `--mode info` follows
            record.add(FACT, MODEL, f"{line}.")
        if options.ENABLE_INTER:
            pairs = zip(options.INTER_STUDENT_INDEX, options.INTER_TEACHER_INDEX, strict=True)
            told = ", ".join(f"{mine} imitates {theirs}" for mine, theirs in pairs)
            record.add(FACT, MODEL, f"Blocks: {told} of the guide (--mode info shows them).")
    if _is_there(cfg.TRAIN.WEIGHTS):
        with record.noting(MODEL, "loading weights", key="TRAIN.WEIGHTS"):
            model = build_model(cfg, pretrained=False)
            load_weights(model, cfg.TRAIN.WEIGHTS, cache=cfg.DOWNLOAD_CACHE)
    if _is_there(cfg.MODEL.PRETRAINED):
        with record.noting(MODEL, "loading weights", key="MODEL.PRETRAINED"):
            build_model(cfg)
    guided = options.ENABLE_INTER or options.ENABLE_LOGIT
    if guided and not options.OFFLINE and _is_there(options.TEACHER_WEIGHTS):
        with record.noting(MODEL, "loading weights", key="DISTILLATION.TEACHER_WEIGHTS"):
            build_teacher(cfg)
            _judge_guide(cfg, options.TEACHER_WEIGHTS, record)
    return record.num_problems() == before


def _judge_guide(cfg: CfgNode, path: str, record: Record) -> None:
    """What the guide's file says of its own training, if it says it."""
    state = read_checkpoint(path, cache=cfg.DOWNLOAD_CACHE)
    errors = [state[k] for k in ("test_err", "ema_err") if isinstance(state.get(k), (int, float))]
    chance = 100 * (1 - 1 / cfg.MODEL.NUM_CLASSES)
    if errors and math.isfinite(min(errors)):
        text = f"the guide's own test error is {min(errors):.1f} % ({path})"
        if min(errors) > 0.9 * chance:
            text += f", where chance has {chance:.1f} %: train it first, or its maps teach little"
        record.add(NOTE if min(errors) > 0.9 * chance else FACT, MODEL, f"{text}.")
    try:
        taught = yaml.safe_load(state["cfg"])["TRAIN"]["DATASET"]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return
    if taught and taught != cfg.TRAIN.DATASET:
        text = f"the guide was trained on {taught}, TRAIN.DATASET is {cfg.TRAIN.DATASET} ({path})."
        record.add(NOTE, MODEL, text)


def _check_data(cfg: CfgNode, record: Record) -> dict[str, ImageDataset]:
    """TRAIN and TEST with their sets as training would use them, as far as it could."""
    listed: dict[str, ImageDataset] = {}
    if not cfg.TRAIN.DATASET:
        return listed  # told already
    before, num_empty = record.num_problems(), 0
    for role, list_data in (("TRAIN", list_train_data), ("TEST", list_test_data)):
        with record.noting(DATA, "listing the images"):
            dataset = list_data(cfg, tolerate=(MISSING, EMPTY_CLASS, UNTRAINED_CLASS))
            listed[role] = dataset
            num_empty += sum(fault.kind == EMPTY_CLASS for fault in dataset.faults)
            for fault in dataset.faults:
                if fault.kind != MISSING:  # missing files are counted with unreadable images
                    record.add(PROBLEM, DATA, fault.text)
    with record.noting(DATA, "comparing the classes"):
        if len(listed) == 2:
            check_same_classes(listed["TRAIN"], listed["TEST"])
        for role, dataset in listed.items():
            if not num_empty:  # else the count is right when that is mended
                check_num_classes(cfg, dataset, role)
    sound = record.num_problems() == before
    splits = {role: _split(cfg, dataset) for role, dataset in listed.items()}
    _judge_images(cfg, splits, record)
    usable = {}
    for role, dataset in listed.items():
        faults_at = {i: image.fault for i, image in enumerate(splits[role].images) if image.fault}
        with record.noting(DATA, "counting the images"):
            readable = drop_unreadable(dataset, faults_at)
            if role == "TRAIN":
                check_batch_size(cfg, readable)
            if sound and (cfg.DATA_LOADER.ON_ERROR == "skip" or not faults_at):
                usable[role] = readable
    return usable


def _split(cfg: CfgNode, dataset: ImageDataset) -> Split:
    role = "training" if dataset.split == "train" else "test"
    threads = usable_workers(cfg.DATA_LOADER.NUM_WORKERS)
    return Split(
        role=role,
        name=f"{dataset.name}/{dataset.split}",
        class_names=dataset.class_names,
        labels=dataset.labels,
        places=[dataset.describe(position) for position in range(len(dataset))],
        images=scan(dataset, num_threads=threads, title=f"looking at the {role} images"),
        is_own=dataset.name == "image_folder",
        of_files=has_image_files(dataset),
    )


def _judge_images(cfg: CfgNode, splits: dict[str, Split], record: Record) -> None:
    for split in splits.values():
        record.extend([findings.size_of(split)])
        record.extend(findings.unreadable(split, skip=cfg.DATA_LOADER.ON_ERROR == "skip"))
        record.extend(findings.copies_within(split))
        record.extend(findings.oddities(split))
    if len(splits) < 2:
        return
    train, test = splits["TRAIN"], splits["TEST"]
    if train.name == test.name:
        text = f"TEST.SPLIT is {cfg.TEST.SPLIT}: the tests are on training images, set it to test."
        record.add(NOTE, DATA, text)
    elif train.class_names == test.class_names:
        record.extend(findings.classes(train, test))
        record.extend(findings.copies_across(train, test))


def _check_bank(cfg: CfgNode, train: ImageDataset, record: Record) -> bool:
    """Stored maps against the guide and the images that they should be of."""
    before, path = record.num_problems(), cfg.DISTILLATION.FEATURE_FILE
    if cfg.DISTILLATION.OFFLINE and _is_there(path):
        with record.noting(MODEL, "opening the file", key="DISTILLATION.FEATURE_FILE"):
            bank = build_guided(cfg)[1]
            assert isinstance(bank, FeatureBank)
            bank.check(indices=train.indices, shapes=bank.shapes, **dataset_facts(train))
            record.add(FACT, MODEL, f"{path} holds the guide's maps of the training images.")
    return record.num_problems() == before


def _check_run(cfg: CfgNode, data: tuple, record: Record) -> None:
    """Builds a training and takes its first steps."""
    share = cfg.clone()
    share.defrost()
    share.TRAIN.BATCH_SIZE //= cfg.NUM_GPUS
    share.TEST.BATCH_SIZE //= cfg.NUM_GPUS
    run = None
    try:
        with record.noting(COST, "training for some steps"):
            run = build_run(share, data, World(), RunLog(cfg.OUT_DIR, enabled=False))
            taken = trial.try_steps(run)
            record.extend(_cost(cfg, run, data, taken))
            record.extend([_disk(cfg, run, taken)])
        if run is not None:
            _check_resume(cfg, run, record)
    finally:
        if run is not None:
            run.close()
            del run
        gc.collect()  # worker processes end with their loader


def _cost(cfg: CfgNode, run: Run, data: tuple, taken: trial.Trial) -> list[findings.Finding]:
    train, test = data
    kept = isinstance(run.loader, CachedTrainLoader)
    return trial.cost(
        taken,
        device=str(run.device),
        batch_size=cfg.TRAIN.BATCH_SIZE // cfg.NUM_GPUS,
        num_processes=cfg.NUM_GPUS,
        steps_per_epoch=len(train) // cfg.TRAIN.BATCH_SIZE,
        max_epoch=cfg.OPTIM.MAX_EPOCH,
        test_period=cfg.TEST.PERIOD,
        test_batches=math.ceil(len(test) / cfg.TEST.BATCH_SIZE),
        with_average=run.average is not None,
        images=f"DATA_LOADER.BACKEND {cfg.DATA_LOADER.BACKEND}: {run.loader}",
        kept_bytes=cached_bytes(cfg, train, test) if kept else 0,
    )


def _disk(cfg: CfgNode, run: Run, taken: trial.Trial) -> findings.Finding:
    files = [*run.checkpoints.files(), *filter(Path.is_file, [run.checkpoints.best])]
    place = existing_folder(Path(cfg.OUT_DIR))
    return trial.disk(
        checkpoint_bytes=taken.checkpoint_bytes,
        count=cfg.TRAIN.KEEP_CHECKPOINTS + 2,
        there=sum(file.stat().st_size for file in files),
        free=shutil.disk_usage(place).free,
        place=str(place),
    )


def _check_resume(cfg: CfgNode, run: Run, record: Record) -> None:
    """Takes up the checkpoints that training would go on from."""
    folder = run.checkpoints.folder
    with record.noting(OUTPUT, f"reading the checkpoints in {folder}"):
        state = run.checkpoints.load_last(lambda text: record.add(NOTE, OUTPUT, text))
        if state is None:
            return
        try:
            run.restore(state)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            text = f"training cannot go on from the last checkpoint in {folder}: {error}. Set "
            record.add(PROBLEM, OUTPUT, f"{text}OUT_DIR to a new folder, or remove the old one.")
            return
        done, epochs = run.progress.epoch, cfg.OPTIM.MAX_EPOCH
        text = f"{folder} has checkpoints, so training goes on after {done} of {epochs} epochs."
        if done >= epochs:
            text = (
                f"{folder} has all {epochs} epochs of OPTIM.MAX_EPOCH: there is nothing left to "
                "train; raise that, or set OUT_DIR to a new folder."
            )
        record.add(NOTE, OUTPUT, text)


def _is_there(path: str | None) -> bool:
    return bool(path) and (is_url(str(path)) or is_local_file(str(path)))
