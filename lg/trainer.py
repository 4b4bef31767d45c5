"""Training and testing: the loop, from top to bottom.

`train`, `test` and `time_steps` build everything from a config; `train_epoch` and `evaluate` are
the loops themselves.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from lg import builders, distributed
from lg.checkpoint import BEST_NAME, load_weights, write_atomically
from lg.config import changed_keys
from lg.datasets.cached_loader import CachedTestLoader
from lg.datasets.loader import MIX, Batch
from lg.device import Precision
from lg.distributed import World
from lg.errors import CheckpointError, ConfigError
from lg.files.lock import claim
from lg.logs.log import RunLog
from lg.logs.reporter import result_lines
from lg.metrics import EvalResult, topk_hits
from lg.progress import UNKNOWN_ERR
from lg.run import Run
from lg.signals import Interrupted, asked_to_stop, stop_signals
from lg.step import accumulate_gradients, update_weights
from lg.tools.doctor import PROBLEM, check_up, report
from lg.tools.timing import complexity, measure, report_times

# Keys whose change between runs is no change of the training or of what it is measured on.
_FREE = (
    "OUT_DIR",
    "DATA_LOADER.NUM_WORKERS",
    "DATA_LOADER.TIMEOUT",
    "DATA_LOADER.PIN_MEMORY",
    "DATA_LOADER.DOWNLOAD",
    "TEST.BATCH_SIZE",
    "TEST.WEIGHTS",
    "TEST.PER_CLASS",
    "TEST.PERIOD",
    "TRAIN.KEEP_CHECKPOINTS",
    "LOG_",
    "DESC",
    "VERBOSE",
    "LAUNCH.",
    "HOST",
    "PORT_RANGE",
    "PREC_TIME.",
    "DOWNLOAD_CACHE",
    "CFG_DEST",
)


def train(cfg: CfgNode) -> None:
    """Trains what the config describes, from its last checkpoint if there is one; the entry of
    every process."""
    with _world(cfg) as world, contextlib.ExitStack() as held:
        builders.check_training(cfg)
        builders.check_world(cfg, world)
        data = builders.fetch_data(cfg, world)
        builders.fetch_weights(cfg, world)
        if world.is_main:
            held.enter_context(claim(cfg.OUT_DIR))
        log = RunLog(cfg.OUT_DIR, enabled=world.is_main, console=cfg.LOG_DEST == "stdout")
        with contextlib.closing(log):
            if cfg.DESC:
                log.say(cfg.DESC)
            run = builders.build_run(cfg, data, world, log)
            _resume(run, auto=cfg.TRAIN.AUTO_RESUME)
            if world.is_main:
                write_atomically(
                    os.path.join(cfg.OUT_DIR, cfg.CFG_DEST),
                    lambda f: f.write(run.settings.config_text.encode()),
                )
            if cfg.VERBOSE:
                log.stats("cfg", yaml.safe_load(run.settings.config_text))
                log.stats("complexity", complexity(run.guided.student, cfg.MODEL.IMG_SIZE))
            try:
                with stop_signals(run):
                    _train_epochs(run)
            finally:
                run.close()


def train_epoch(run: Run) -> None:
    """Trains one epoch, from the step that `run.progress` names to its end."""
    progress, settings, report = run.progress, run.settings, run.report
    run.module.train()
    lr = run.learning_rate.apply(run.optimizer, progress.epoch)
    report.start_epoch(progress.epoch, progress.step)
    while progress.step < run.loader.steps_per_epoch:
        # The next batch, augmented by the workers, on its way to the device.
        batch = next(run.loader).to(run.device)
        # Targets, and mixing whose draws depend on the position in the run alone.
        position = (settings.seed, MIX, progress.epoch, progress.step, run.world.rank)
        images, targets = run.mixing(batch.images, batch.labels, np.random.default_rng(position))
        # Forward and backward, student and guide on the same images.
        losses, hits = accumulate_gradients(run, batch._replace(images=images), targets)
        # One optimiser step, then the weight average follows it.
        update_weights(run)
        total_step = progress.epoch * run.loader.steps_per_epoch + progress.step
        if run.average is not None:
            run.average.update(total_step, warming=progress.epoch < settings.warmup_epochs)
        # Counts stay on the device until a log point reads them.
        run.meter.add(losses, hits)
        progress.step += 1
        if (total_step + 1) % settings.log_period == 0:
            run.meter.collect(epoch=progress.epoch, step=progress.step)
            report.count_step()
            report.iteration(run.meter.window(), progress=progress, lr=lr)
        else:
            report.count_step()
            run.log.advance()
        # Asked to stop: save here, in the middle of the epoch.
        if progress.step < run.loader.steps_per_epoch and asked_to_stop(run, total_step):
            run.meter.collect(epoch=progress.epoch, step=progress.step)
            raise Interrupted(run.signals[0], run.save())
    # The epoch's means; then the next epoch begins at its first step.
    run.meter.collect(epoch=progress.epoch, step=progress.step)
    report.train_epoch(run.meter.epoch(), epoch=progress.epoch, lr=lr)
    run.meter.end_epoch()
    progress.epoch, progress.step = progress.epoch + 1, 0


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Batch] | CachedTestLoader,
    *,
    num_classes: int,
    precision: Precision,
    weights: Mapping[str, Tensor] | None = None,
    before_batch: Callable[[int], None] = lambda number: None,
) -> EvalResult:
    """Tests a model on every sample once, over all processes.

    Args:
        model: images [N, 3, S, S] to logits [N, K].
        loader: this process's share of the samples.
        num_classes: K.
        precision: of the forward pass; also says where it runs.
        weights: used in place of the model's own, by name.
        before_batch: called with the number of each batch.
    """
    model.eval()
    counts = torch.zeros(num_classes, 3, dtype=torch.int64, device=precision.device)
    for number, batch in enumerate(loader):
        before_batch(number)
        batch = batch.to(precision.device)
        # Scores, from the weights asked for.
        with precision.autocast():
            logits = (
                model(batch.images)
                if weights is None
                else functional_call(model, dict(weights), (batch.images,))
            )
        # Samples, top-1 and top-5 hits, by class; nothing is read back before the end.
        hits = topk_hits(logits, batch.labels)
        rows = torch.cat([torch.ones_like(hits[:, :1]), hits], dim=1)
        counts.index_add_(0, batch.labels, rows.to(torch.int64))
    return EvalResult.from_counts(distributed.sum_over_processes(counts))


def test(cfg: CfgNode) -> EvalResult:
    """Tests TEST.WEIGHTS (by default the best of OUT_DIR) on the test split and says the result."""
    with _world(cfg) as world:
        path = cfg.TEST.WEIGHTS or os.path.join(cfg.OUT_DIR, BEST_NAME)
        if not cfg.TEST.WEIGHTS and not os.path.isfile(path):
            raise ConfigError(
                f"TEST.WEIGHTS is '' and there is no {path}; name the weights to test, or train "
                "first."
            )
        dataset = builders.build_test_data(cfg)
        device = builders.build_device(cfg, world)
        model = builders.build_model(cfg, pretrained=False)
        with distributed.in_turn(world):  # it may have to be fetched
            load_weights(model, path, cache=cfg.DOWNLOAD_CACHE)
        model.to(device)
        loader = builders.build_test_loader(cfg, dataset, world, device)
        try:
            result = evaluate(
                model,
                loader,
                num_classes=cfg.MODEL.NUM_CLASSES,
                precision=builders.build_precision(cfg, device),
            )
        finally:
            if isinstance(loader, CachedTestLoader):
                loader.close()
        names = dataset.class_names if cfg.TEST.PER_CLASS else None
        if world.is_main:
            print(
                "\n".join(
                    result_lines(result, split=f"{dataset.name}/{dataset.split}", class_names=names)
                )
            )
        return result


test.__test__ = False  # type: ignore[attr-defined]  # not a test case, whatever its name


def info(cfg: CfgNode) -> None:
    """Says what the config builds: parameters, multiply-adds, and the table of blocks and taps."""
    print("\n".join(builders.build_info(cfg)))


def doctor(cfg: CfgNode) -> None:
    """Says what would stop the config's training or spoil its result; ends with status 1 if
    anything would."""
    findings = check_up(cfg)
    print("\n".join(report(findings)))
    if any(each.level == PROBLEM for each in findings):
        sys.exit(1)


def time_steps(cfg: CfgNode) -> dict[str, float]:
    """Measures forward, backward, loader and full step of the config's training; says the table."""
    with _world(cfg) as world:
        builders.check_training(cfg, trained_guide=False)
        builders.check_world(cfg, world)
        data = builders.fetch_data(cfg, world)
        log = RunLog(cfg.OUT_DIR, enabled=world.is_main)
        with contextlib.closing(log):
            run = builders.build_run(cfg, data, world, log)
            try:
                warmup, repeats = cfg.PREC_TIME.WARMUP_ITER, cfg.PREC_TIME.NUM_ITER
                times = measure(run, warmup=warmup, repeats=repeats)
                report_times(times, run)
            finally:
                run.close()
        return times


@contextlib.contextmanager
def _world(cfg: CfgNode) -> Iterator[World]:
    """This process among all, for as long as it takes. After a fault it does not wait for the
    others, who may wait for it: it just ends, and they notice."""
    world = distributed.join(backend=cfg.DIST_BACKEND, device=cfg.DEVICE)
    builders.build_device(cfg, world)  # NCCL exchanges between the devices that are chosen
    try:
        yield world
    except Interrupted:
        distributed.leave()
        raise
    distributed.leave()


def _train_epochs(run: Run) -> None:
    progress, settings = run.progress, run.settings
    run.loader.start(progress.epoch, progress.step)
    while progress.test_due or progress.epoch < settings.max_epoch:
        if not progress.test_due:  # else the run was stopped in its test
            progress.test_err = progress.ema_err = UNKNOWN_ERR  # of the weights to come
            train_epoch(run)
            last = progress.epoch == settings.max_epoch
            progress.test_due = last or progress.epoch % settings.test_period == 0
        is_best = progress.test_due and _test_epoch(run)
        progress.test_due = False
        run.report.end_epoch()
        path = run.save(is_best=is_best)
        if progress.epoch < settings.max_epoch and asked_to_stop(run, None):
            raise Interrupted(run.signals[0], path)
    if not progress.best:  # a run that is shorter than it was, and was not tested yet
        run.save(is_best=_test_epoch(run))
    best = {kind: (b["top1_err"], int(b["epoch"])) for kind, b in progress.best.items()}
    run.report.finished(progress.test_err, progress.ema_err, best, count=progress.test_count)


def _test_epoch(run: Run) -> bool:
    """Tests the student and its average; True when the better of the two is the best so far."""
    progress = run.progress
    distributed.broadcast_buffers(run.guided.student)  # test what is saved
    shared = distributed.smallest(len(run.test_loader), run.device)  # batches that all have

    def stop_if_asked(number: int) -> None:
        if number < shared and asked_to_stop(run, number):
            raise Interrupted(run.signals[0], run.save())

    errors = {}
    for kind, weights in (("test", None), ("ema", run.average.state if run.average else None)):
        if kind == "ema" and weights is None:
            continue
        started = time.perf_counter()
        result = evaluate(
            run.guided.student,
            run.test_loader,
            num_classes=run.settings.num_classes,
            precision=run.precision,
            weights=weights,
            before_batch=stop_if_asked,
        )
        seconds = time.perf_counter() - started
        best = progress.best.setdefault(
            kind, {"top1_err": float("inf"), "top5_err": float("inf"), "epoch": 0}
        )
        if result.top1_err < best["top1_err"]:
            best.update(top1_err=result.top1_err, epoch=progress.epoch)
        best["top5_err"] = min(best["top5_err"], result.top5_err)
        errors[kind] = result.top1_err
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
    is_best = min(errors.values()) < progress.best_err
    progress.best_err = min(*errors.values(), progress.best_err)
    return is_best


def _resume(run: Run, *, auto: bool) -> None:
    """Takes up the last checkpoint of the run's folder; opens TensorBoard where the curves go
    on."""
    if not auto and run.checkpoints.files():
        raise ConfigError(
            f"TRAIN.AUTO_RESUME is False, but {run.checkpoints.folder} has checkpoints of an "
            f"earlier run; choose another "
            "OUT_DIR, remove them, or set TRAIN.AUTO_RESUME True."
        )
    state = run.checkpoints.load_last(run.log.warn)
    if state is not None:
        try:
            run.restore(state)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"Cannot go on from the last checkpoint in {run.checkpoints.folder}: {error}."
            ) from None
        changed = [
            c
            for c in changed_keys(state["cfg"], run.settings.config_text)
            if not c.startswith(_FREE)
        ]
        if changed:
            run.log.warn(f"Going on with other settings than before: {'; '.join(changed)}.")
        if len(state["rng_state"]) != run.world.size:
            run.log.warn(
                f"The run had {len(state['rng_state'])} processes, now {run.world.size}: it goes "
                f"on, not bit for bit."
            )
        before = state["sampler_state"].get("backend", run.loader.backend)
        if before != run.loader.backend:
            run.log.warn(
                f"Images came by DATA_LOADER.BACKEND {before} before and now come by "
                f"{run.loader.backend}, whose draws are others: the run goes on, not bit for bit. "
                f"Set DATA_LOADER.BACKEND {before} for that."
            )
        progress = run.progress
        within = f" and {progress.step} steps" if progress.step else ""
        run.log.say(f"Going on after {progress.epoch} epochs{within} of {run.settings.max_epoch}.")
    run.log.open_board(run.progress.epoch * run.loader.steps_per_epoch + run.progress.step + 1)
