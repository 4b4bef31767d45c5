"""Where the time of a training step goes: forward, backward, loader, full step."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import mean, median

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lg.datasets.loader import MIX, Batch
from lg.device import synchronize
from lg.models.backbone import evaluating
from lg.run import Run
from lg.step import accumulate_gradients, forward, micro_batches, update_weights


def measure(run: Run, *, warmup: int, repeats: int) -> dict[str, float]:
    """Seconds per batch of each part of training, after warm-up; medians but for the loader.

    Args:
        run: a run that has not started; its weights change.
        warmup: repeats that do not count.
        repeats: repeats that count.

    Returns:
        `test_fw_time`: the student's forward pass in evaluation. `train_fw_time`: student, guide
        and loss. `train_bw_time`: backward. `train_fw_bw_time`: the whole step, optimiser
        included, on one batch in place. `train_loader_time`: mean time to the next batch when the
        workers have nothing else to wait for, not counting what they had ready. `train_step_time`:
        the whole step with a new batch each time. `train_loader_overhead`: what the loader adds to
        the step, as a fraction of it.
    """
    run.loader.start(0, 0)

    def next_batch() -> Batch:
        try:
            return next(run.loader).to(run.device)
        except StopIteration:
            run.loader.start(0, 0)
            return next(run.loader).to(run.device)

    def targets_of(batch: Batch) -> Tensor:
        rng = np.random.default_rng((run.settings.seed, MIX))
        return run.mixing(batch.images, batch.labels, rng)[1]

    def timed(work: Callable[[], object]) -> list[float]:
        seconds = []
        for _ in range(warmup + repeats):
            synchronize(run.device)
            started = time.perf_counter()
            work()
            synchronize(run.device)
            seconds.append(time.perf_counter() - started)
        return seconds[warmup:]

    def whole() -> None:
        fresh = next_batch()
        _step(run, fresh, targets_of(fresh))

    batch = next_batch()
    targets = targets_of(batch)
    run.module.eval()
    with torch.no_grad(), run.precision.autocast():
        times = {"test_fw_time": median(timed(lambda: run.guided.student(batch.images)))}
    run.module.train()
    parts = micro_batches(run, batch, targets)
    times["train_fw_time"] = median(timed(lambda: [forward(run, *part)[0] for part in parts]))
    both = median(timed(lambda: accumulate_gradients(run, batch, targets)))
    times["train_bw_time"] = both - times["train_fw_time"]
    run.optimizer.zero_grad(set_to_none=True)
    times["train_fw_bw_time"] = median(timed(lambda: _step(run, batch, targets)))
    for _ in range(run.loader.num_prefetched):
        next_batch()
    times["train_loader_time"] = mean(timed(next_batch))
    times["train_step_time"] = median(timed(whole))
    times["train_loader_overhead"] = times["train_step_time"] / times["train_fw_bw_time"] - 1
    return times


def report_times(times: dict[str, float], run: Run) -> None:
    """Says the table of `measure` and writes the stats of steps and epochs."""
    log, size, steps = run.log, run.report.batch_size, run.loader.steps_per_epoch
    rows = {
        "student forward (test)": "test_fw_time",
        "forward with guide and loss": "train_fw_time",
        "backward": "train_bw_time",
        "step on a batch in place": "train_fw_bw_time",
        "loader alone": "train_loader_time",
        "step with loader": "train_step_time",
    }
    log.say(f"Batches of {size} on {run.device} in {run.precision}, median seconds (loader: mean):")
    for title, key in rows.items():
        log.say(f"  {title:<28} {times[key]:9.4f} s  {size / times[key]:10,.0f} images/s")
    log.say(f"  {'loader overhead':<28} {100 * times['train_loader_overhead']:9.1f} %")
    log.say(f"  {'training epoch':<28} {steps * times['train_step_time']:9.1f} s  ({steps} steps)")
    log.stats("iter_times", times)
    log.stats(
        "epoch_times",
        {
            "train_fw_bw_time": steps * times["train_fw_bw_time"],
            "train_step_time": steps * times["train_step_time"],
        },
    )


def complexity(model: nn.Module, image_size: int, in_channels: int = 3) -> dict[str, int]:
    """Parameters, and multiply-adds of one image's forward pass."""
    # Detached: the counter follows gradients through what requires them, even where none are kept.
    state = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers())}
    image = torch.zeros(
        1, in_channels, image_size, image_size, device=next(iter(state.values())).device
    )
    # Fused attention is not counted everywhere; its two matrix products are.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, evaluating(model), plain:
        functional_call(model, state, (image,))
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "macs": counter.get_total_flops() // 2,
    }


def _step(run: Run, batch: Batch, targets: Tensor) -> None:
    accumulate_gradients(run, batch, targets)
    update_weights(run)
