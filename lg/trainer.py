"""Training and testing: the loops, from top to bottom."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import yaml
from torch import nn
from yacs.config import CfgNode

from lg import builders, distributed
from lg.checkpoint import BEST_NAME, load_weights
from lg.config import stored_config
from lg.datasets.base import ImageDataset
from lg.datasets.cached_loader import TestLoader
from lg.datasets.loader import Batch
from lg.device import Precision, machine_facts
from lg.distributed import World
from lg.errors import ConfigError
from lg.files.atomic import write_text
from lg.files.lock import lock_folder
from lg.logs.log import RunLog
from lg.logs.results import result_lines
from lg.metrics import UNKNOWN_ERR, EvalResult, TestMeter
from lg.models.complexity import complexity
from lg.paths import source_commit
from lg.run import Progress, Run, resume
from lg.signals import Interrupted, asked_to_stop, stop_signals
from lg.step import mix, train_step


def train(cfg: CfgNode, *, after_test: Callable[[Progress], None] | None = None) -> Progress:
    """Train the model of a config, resuming from its last checkpoint. Every process calls this.

    `after_test` is called after each test, once all is saved; what it raises ends the training.
    """
    with joined_world(cfg) as world, contextlib.ExitStack() as stack:
        # Reject what cannot be trained; download data and weights once, for all processes.
        builders.check_training(cfg)
        builders.check_world(cfg, world)
        data = builders.fetch_data(cfg, world)
        builders.fetch_weights(cfg, world)
        # Lock the output folder before anything is written to it.
        if world.is_main:
            stack.enter_context(lock_folder(cfg.OUT_DIR))
        log = RunLog(cfg.OUT_DIR, enabled=world.is_main, console=cfg.LOG_DEST == "stdout")
        stack.enter_context(contextlib.closing(log))
        if cfg.DESC:
            log.info(cfg.DESC)
        # Build everything, then load the last checkpoint into it.
        run = stack.enter_context(contextlib.closing(builders.build_run(cfg, data, world, log)))
        resume(run, auto=cfg.TRAIN.AUTO_RESUME, changed=cfg.TRAIN.RESUME_CHANGED)
        # Record what is trained.
        config_text = run.settings.config_text
        if world.is_main:
            path = os.path.join(cfg.OUT_DIR, cfg.CFG_DEST)
            write_text(path, config_text)
        if cfg.VERBOSE:
            log.stats("cfg", yaml.safe_load(config_text))
            sizes = cfg.MODEL.IMG_SIZE, cfg.MODEL.IN_CHANNELS
            log.stats("complexity", complexity(run.guided.student, *sizes))
            facts = machine_facts(run.device)
            log.stats("machine", {**facts, "processes": world.size, "commit": source_commit()})
        with stop_signals(run):
            train_epochs(run, after_test)
        return run.progress


def train_epochs(run: Run, after_test: Callable[[Progress], None] | None = None) -> None:
    """Train, test and save, epoch by epoch, from the position in `run.progress`."""
    progress, settings = run.progress, run.settings
    run.loader.start(progress.epoch, progress.step)
    if run.is_trained and progress.tested_epoch < progress.epoch:
        progress.test_due = True  # MAX_EPOCH or EARLY_STOP was lowered
    while progress.test_due or not run.is_trained:
        if not progress.test_due:  # a run interrupted during a test repeats the test only
            progress.test_err = progress.ema_err = UNKNOWN_ERR
            progress.final = {}  # of a run that had fewer epochs
            train_epoch(run)
            is_last = progress.epoch == settings.max_epoch
            progress.test_due = is_last or progress.epoch % settings.test_period == 0
        is_best = progress.test_due and test_epoch(run)
        is_tested, progress.test_due = progress.test_due, False
        run.report.end_epoch(is_last=run.is_trained)
        path = run.save(is_best=is_best)
        if is_tested and after_test is not None:
            after_test(progress)
        if not run.is_trained and asked_to_stop(run, None):
            raise Interrupted(run.signals[0], path)
    if run.final_loader is not None and not progress.final:
        test_best(run, run.final_loader)
    run.report.finished(progress)


def train_epoch(run: Run) -> None:
    """Train from the step in `run.progress` to the end of its epoch."""
    progress, report, num_steps = run.progress, run.report, run.loader.steps_per_epoch
    run.module.train()
    lr = run.learning_rate.apply(run.optimizer, progress.epoch)
    report.start_epoch(progress.epoch, progress.step)
    while progress.step < num_steps:
        # The next augmented batch: mixing, forward, backward, optimiser step.
        batch = next(run.loader).to(run.device)
        if progress.epoch == progress.step == 0:
            report.pictures.train_batch(*mix(run, batch, epoch=0, step=0))
        losses, hits = train_step(run, batch, epoch=progress.epoch, step=progress.step)
        # The weight average follows the weights.
        total_step = progress.epoch * num_steps + progress.step
        if run.average is not None:
            is_warming = progress.epoch < run.settings.warmup_epochs
            run.average.follow(run.guided.student, total_step, warming=is_warming)
        # Losses and hits stay on the device until a log point reads them.
        run.meter.add(losses, hits)
        progress.step += 1
        if (total_step + 1) % run.settings.log_period == 0:
            run.meter.collect(epoch=progress.epoch, step=progress.step)
            report.count_step()
            report.iteration(run.meter.window(), epoch=progress.epoch, step=progress.step, lr=lr)
        else:
            report.count_step()
            run.log.advance()
        # After a stop signal, save in the middle of the epoch.
        if progress.step < num_steps and asked_to_stop(run, total_step):
            run.meter.collect(epoch=progress.epoch, step=progress.step)
            raise Interrupted(run.signals[0], run.save())
    # Report the means of the epoch and move on to the next one.
    run.meter.collect(epoch=progress.epoch, step=progress.step)
    means, factor = run.meter.epoch(), run.schedule.factor(progress.epoch)
    report.train_epoch(
        means, epoch=progress.epoch, lr=lr, factor=factor, mixture=run.guided.mixture()
    )
    run.meter.end_epoch()
    progress.epoch, progress.step = progress.epoch + 1, 0
    # The schedule of guidance may follow the imitation loss.
    run.schedule.observe(means["inter"] + means["logit"])
    is_over = factor > 0 and run.schedule.factor(progress.epoch) == 0
    if is_over and progress.epoch < run.settings.max_epoch:
        report.guidance_ended(progress.epoch)


def test_epoch(run: Run) -> bool:
    """Test the student and its weight average; return whether the better one is the best so far."""
    progress = run.progress
    models: dict[str, nn.Module] = {"test": run.guided.student}
    if run.average is not None:
        models["ema"] = run.average.module
    errors = {}
    for kind, model in models.items():
        # Every process tests the buffers that the main process saves.
        distributed.broadcast_buffers(model)
        started = time.perf_counter()
        result = evaluate(
            model,
            _until_stopped(run, run.test_loader),
            num_classes=run.settings.num_classes,
            precision=run.precision,
        )
        seconds = time.perf_counter() - started
        # Keep the lowest errors, and the epoch (from 1) of the lowest top-1 error.
        errors[kind] = result.top1_err
        unknown = {"top1_err": float("inf"), "top5_err": float("inf"), "epoch": 0}
        best = progress.best.setdefault(kind, unknown)
        if result.top1_err < best["top1_err"]:
            best.update(top1_err=result.top1_err, epoch=progress.epoch)
        best["top5_err"] = min(best["top5_err"], result.top5_err)
        progress.test_count = result.count
        run.report.test_epoch(
            result,
            best,
            epoch=progress.epoch - 1,
            seconds=seconds,
            batches=len(run.test_loader),
            average=kind == "ema",
        )
    progress.test_err, progress.ema_err = errors["test"], errors.get("ema", UNKNOWN_ERR)
    progress.tested_epoch = progress.epoch
    is_best = min(errors.values()) < progress.best_err
    progress.num_stale += 1
    if is_best:
        progress.best_err, progress.best_epoch = min(errors.values()), progress.epoch
        progress.num_stale = 0
    return is_best


def test_best(run: Run, loader: TestLoader) -> None:
    """Test the best weights on the test set, once, and save the result."""
    progress = run.progress
    model = copy.deepcopy(run.guided.student)
    load_weights(model, run.checkpoints.best)
    result = evaluate(
        model,
        _until_stopped(run, loader),
        num_classes=run.settings.num_classes,
        precision=run.precision,
    )
    progress.final = {**result.rates, "count": result.count}
    run.report.final_test(progress, result)
    run.save()


def _until_stopped(run: Run, loader: TestLoader) -> Iterator[Batch]:
    """Yield the test batches; after a stop signal, save and raise `Interrupted`."""
    num_shared = distributed.min_over_processes(len(loader), run.device)
    for number, batch in enumerate(loader):
        # asked_to_stop waits for all processes, so only batches that each of them has may call it.
        if number < num_shared and asked_to_stop(run, number):
            raise Interrupted(run.signals[0], run.save())
        yield batch


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_classes: int,
    precision: Precision,
) -> EvalResult:
    """Test a model on every sample once, over all processes.

    Args:
        model: Images [N, C, S, S] to logits [N, K].
        batches: This process's share of the samples.
        num_classes: K.
        precision: Of the forward pass; its device runs the test.
    """
    model.eval()
    meter = TestMeter(num_classes, precision.device)
    for batch in batches:
        batch = batch.to(precision.device)
        with precision.autocast():
            logits = model(batch.images)
        # Counts stay on the device.
        meter.add(logits, batch.labels)
    # Add the counts of all processes, and read them once.
    return meter.result()


def test(cfg: CfgNode) -> EvalResult:
    """Test TEST.WEIGHTS on the images that `load_tested` lists, and print the result."""
    with joined_world(cfg) as world:
        cfg, model, dataset, precision = load_tested(cfg, world)
        loader = builders.build_test_loader(cfg, dataset, world, precision.device)
        with contextlib.closing(loader):
            result = evaluate(model, loader, num_classes=cfg.MODEL.NUM_CLASSES, precision=precision)
        if world.is_main:
            names = dataset.class_names if cfg.TEST.PER_CLASS else None
            print("\n".join(result_lines(result, split=str(dataset), class_names=names)))
        return result


def load_tested(cfg: CfgNode, world: World) -> tuple[CfgNode, nn.Module, ImageDataset, Precision]:
    """Load TEST.WEIGHTS (default: the best of OUT_DIR), and list the images to test it with.

    The labels follow the classes of the weights, whose names checkpoints of this project hold.

    Returns:
        (config with the MEAN and STD of the training, model on its device, images, precision)

    Raises:
        ConfigError: There are no weights, or they were trained with another normalisation.
        DataError: The images have classes that the model does not know.
    """
    path = tested_weights(cfg)
    cfg = builders.with_trained_statistics(cfg, path, world)
    precision = builders.build_precision(cfg, builders.build_device(cfg, world))
    model = builders.build_model(cfg, pretrained=False)
    with distributed.in_turn(world):  # a URL is downloaded once
        facts = load_weights(model, path, cache=cfg.DOWNLOAD_CACHE)
    names = facts.get("class_names")
    trained_root = stored_config(facts).get("DATA_LOADER.ROOT", "")
    is_other = os.path.realpath(trained_root) != os.path.realpath(cfg.DATA_LOADER.ROOT)
    dataset = builders.build_test_data(cfg, names, other_root=names is not None and is_other)
    if world.is_main:
        for note in builders.data_notes(dataset):
            print(f"Warning: {note}.", file=sys.stderr, flush=True)
    builders.place_model(model, precision)
    return cfg, model, dataset, precision


def tested_weights(cfg: CfgNode) -> str:
    """Return TEST.WEIGHTS, by default the path of the best weights in OUT_DIR.

    Raises:
        ConfigError: It is not set and there are no such weights.
    """
    path = cfg.TEST.WEIGHTS or os.path.join(cfg.OUT_DIR, BEST_NAME)
    if not cfg.TEST.WEIGHTS and not os.path.isfile(path):
        raise ConfigError(
            f"TEST.WEIGHTS is '' and {path} does not exist: set TEST.WEIGHTS to the weights to "
            "test, or train first."
        )
    return path


@contextlib.contextmanager
def joined_world(cfg: CfgNode) -> Iterator[World]:
    """Join the process group; leave it on success and on interruption.

    After an error the process ends without leaving: the others may be waiting for it, and leaving
    would wait for them.
    """
    world = distributed.join(backend=cfg.DIST_BACKEND, device=cfg.DEVICE)
    builders.build_device(cfg, world)  # NCCL communicates between the selected devices
    try:
        yield world
    except Interrupted:
        distributed.leave()
        raise
    distributed.leave()
