"""The training loop: exact resume, the files it writes, how it stops."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import lg
from lg import trainer
from lg.builders import check_world
from lg.checkpoint import read_checkpoint
from lg.distributed import World
from lg.errors import CheckpointError, ConfigError, NonFiniteLossError
from lg.guidance import FrozenTeacher
from lg.signals import Interrupted
from tests.run_cases import (
    CONFIGS,
    STEPS,
    assert_same,
    config,
    final_state,
    stats,
    train_and_stop,
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, guide_file: Path) -> Path:
    out_dir = tmp_path_factory.mktemp("straight")
    trainer.train(config(out_dir, guide_file))
    return out_dir


# After the first step, within an epoch, before and at its end, before the last step.
@pytest.mark.parametrize(
    ("steps", "workers", "backends"),
    [
        (1, 0, ("device", "device")),
        (2, 2, ("device", "workers")),
        (3, 0, ("workers", "auto")),
        (4, 2, ("workers", "auto")),
        (6, 0, ("device", "device")),
        (11, 2, ("device", "workers")),
    ],
)
def test_resume_is_exact(
    steps: int,
    workers: int,
    backends: tuple[str, str],
    straight: Path,
    tmp_path: Path,
    guide_file: Path,
) -> None:
    """A resumed run may also read its images in another way."""
    first, second = (
        config(tmp_path, guide_file, DATA_LOADER__NUM_WORKERS=workers, DATA_LOADER__BACKEND=backend)
        for backend in backends
    )
    stop = train_and_stop(first, steps)
    assert stop.code == 128 + signal.SIGTERM
    torch.manual_seed(99)  # another process has another random state
    trainer.train(second)
    expected, state = final_state(straight), final_state(tmp_path)
    for either in (expected, state):
        either.pop("cfg")  # DATA_LOADER differs
    assert state["guidance_state"] and state["ema_state"]
    assert_same(state, expected)
    assert_same(stats(tmp_path), stats(straight))


def test_resume_in_channels_last_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also from a checkpoint whose momentum has the other memory layout."""
    opts = ["DEVICE", "cpu", "TRAIN.BATCH_SIZE", "60", "OPTIM.MAX_EPOCH", "2"]
    opts += ["DATA_LOADER.NUM_WORKERS", "0", "LOG_PICTURES", "False", "OUT_DIR"]
    cfgs = [
        lg.load_config(CONFIGS / "digits/r-8_digits.yaml", [*opts, str(tmp_path / name)])
        for name in ("straight", "resumed")
    ]
    trainer.train(cfgs[0])
    assert "channels_last" in capsys.readouterr().out
    train_and_stop(cfgs[1], 3)
    (path,) = (tmp_path / "resumed/checkpoints").glob("*.pyth")
    state = read_checkpoint(path)
    momenta = [each["momentum_buffer"] for each in state["optimizer_state"]["state"].values()]
    assert any(not momentum.is_contiguous() for momentum in momenta)
    for each in state["optimizer_state"]["state"].values():
        each["momentum_buffer"] = each["momentum_buffer"].contiguous()
    torch.save(state, path)
    trainer.train(cfgs[1])
    assert_same(*(final_state(tmp_path / name, 2) for name in ("straight", "resumed")))


def test_resume_after_repeated_interruptions_is_exact(
    straight: Path, tmp_path: Path, guide_file: Path
) -> None:
    cfg = config(tmp_path, guide_file)
    for _ in range(5):
        train_and_stop(cfg, 2)
    trainer.train(cfg)
    assert_same(final_state(tmp_path), final_state(straight))
    assert_same(stats(tmp_path), stats(straight))


@pytest.mark.parametrize("batch", [0, 2, 4])
def test_resume_after_a_stop_within_a_test_is_exact(
    straight: Path,
    tmp_path: Path,
    guide_file: Path,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Batches 0 to 2 test the weights, the others their average; the test is repeated."""
    cfg, add, asked = config(tmp_path, guide_file), trainer.TestMeter.add, []

    def counted(*args: Any) -> Any:
        asked.append(1)
        if len(asked) == batch + 1:
            signal.raise_signal(signal.SIGTERM)
        return add(*args)

    monkeypatch.setattr(trainer.TestMeter, "add", counted)
    with pytest.raises(Interrupted):
        trainer.train(cfg)
    assert len(asked) == batch + 1
    monkeypatch.undo()
    capsys.readouterr()
    trainer.train(cfg)
    assert re.search(r"^epoch 1/3  digits/test top-1 ", capsys.readouterr().out, re.MULTILINE)
    assert_same(final_state(tmp_path), final_state(straight))


def test_less_free_memory_changes_nothing(
    straight: Path,
    tmp_path: Path,
    guide_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lg.builders.data.free_memory", lambda device: 0)
    trainer.train(config(tmp_path, guide_file))
    assert "images are read and augmented in this process" in capsys.readouterr().out
    assert_same(final_state(tmp_path), final_state(straight))


def test_another_seed_gives_another_run(straight: Path, tmp_path: Path, guide_file: Path) -> None:
    trainer.train(config(tmp_path, guide_file, RNG_SEED=2))
    key = "layers.0.mlp.fc1.weight"
    states = [final_state(d)["model_state"][key] for d in (straight, tmp_path)]
    assert not torch.equal(*states)


def test_files_of_a_run(straight: Path) -> None:
    names = sorted(p.name for p in (straight / "checkpoints").iterdir())
    assert names == ["model_epoch_0002.pyth", "model_epoch_0003.pyth"]
    best = read_checkpoint(straight / "model.pyth")
    state = final_state(straight)
    assert {"epoch", "test_err", "ema_err", "model_state", "ema_state", "optimizer_state"} < {*best}
    assert state["epoch"] == 2
    keys = [*state["model_state"]]
    assert keys[:3] == ["cls_token", "pos_embed", "patch_embed.projection.weight"]
    assert not any("heads" in k for k in (*keys, *state["ema_state"]))
    assert [*state["guidance_state"]] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    lines = stats(straight)
    kinds = [line["_type"] for line in lines]
    assert kinds.count("train_iter") == 3 * STEPS // 3
    assert kinds.count("train_epoch") == kinds.count("test_epoch") == 3
    assert kinds.count("test_ema_epoch") == 3
    tested = [line["top1_err"] for line in lines if line["_type"] == "test_epoch"]
    averaged = [line["top1_err"] for line in lines if line["_type"] == "test_ema_epoch"]
    assert min(best["test_err"], best["ema_err"]) == pytest.approx(min(tested + averaged), abs=1e-4)
    assert (straight / "config.yaml").exists()
    assert any((straight / "tensorboard").iterdir())
    assert lg.load_config(straight / "config.yaml").TRAIN.BATCH_SIZE == 30


def test_mode_test_agrees_with_training(
    straight: Path, guide_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = trainer.test(config(straight, guide_file, TEST__PER_CLASS=True))
    best = read_checkpoint(straight / "model.pyth")
    assert result.top1_err == pytest.approx(min(best["test_err"], best["ema_err"]), abs=1e-9)
    assert result.count == 597
    out = capsys.readouterr().out
    assert f"digits/test: top-1 {100 - result.top1_err:.2f} %, top-5 " in out
    assert "of 597 images; balanced accuracy " in out and len(out.strip().splitlines()) == 11


def test_a_finished_run_is_not_trained_again(straight: Path, guide_file: Path) -> None:
    before = (straight / "checkpoints/model_epoch_0003.pyth").stat().st_mtime_ns
    trainer.train(config(straight, guide_file))
    assert (straight / "checkpoints/model_epoch_0003.pyth").stat().st_mtime_ns == before


def test_a_truncated_checkpoint_is_skipped(
    straight: Path, tmp_path: Path, guide_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path, guide_file)
    trainer.train(cfg)
    last = tmp_path / "checkpoints/model_epoch_0003.pyth"
    last.write_bytes(last.read_bytes()[:-1000])
    trainer.train(cfg)
    captured = capsys.readouterr()
    assert "model_epoch_0003.pyth" in captured.err and "Skipping this checkpoint." in captured.err
    assert "Resuming after epoch 2 of 3" in captured.out
    assert_same(final_state(tmp_path), final_state(straight))


def test_weights_that_the_last_step_made_non_finite_are_not_saved(tmp_path: Path) -> None:
    # One step per epoch: the loss shows the damage of a step only after the next forward pass.
    changes = {"TRAIN__BATCH_SIZE": 120, "OPTIM__OPTIMIZER": "sgd", "OPTIM__WARMUP_EPOCHS": 0}
    changes |= {"OPTIM__BASE_LR": 1e38, "OPTIM__CLIP_GRAD_NORM": 0.0, "OPTIM__WEIGHT_DECAY": 1e5}
    with pytest.raises(NonFiniteLossError, match=r"last step of epoch 1 made \d+ weights"):
        trainer.train(config(tmp_path, None, **changes))
    assert not (tmp_path / "checkpoints").exists()


def test_an_average_switched_on_later_starts_from_the_weights(tmp_path: Path) -> None:
    trainer.train(config(tmp_path, None, OPTIM__EMA_UPDATE_PERIOD=0, OPTIM__MAX_EPOCH=1))
    before = final_state(tmp_path, epoch=1)["model_state"]
    changes = {"OPTIM__MAX_EPOCH": 2, "OPTIM__WARMUP_EPOCHS": 0, "OPTIM__EMA_ALPHA": 1e-12}
    changes["TRAIN__RESUME_CHANGED"] = True
    trainer.train(config(tmp_path, None, **changes))
    state = final_state(tmp_path, epoch=2)
    for key, value in state["ema_state"].items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-7)
    key = "layers.0.mlp.fc1.weight"
    assert not torch.allclose(state["model_state"][key], before[key], atol=1e-5)


def test_a_run_shortened_before_its_first_test_is_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_and_stop(config(tmp_path, None, TEST__PERIOD=3), STEPS)
    assert not (tmp_path / "model.pyth").exists()
    trainer.train(config(tmp_path, None, TEST__PERIOD=3, OPTIM__MAX_EPOCH=1))
    assert "Finished 1 epoch." in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "model.pyth")["test_err"] < 100


def test_a_run_shortened_after_a_test_is_tested_at_its_end(tmp_path: Path) -> None:
    train_and_stop(config(tmp_path, None, TEST__PERIOD=1), 2 * STEPS)
    changes = {"TEST__PERIOD": 2, "OPTIM__MAX_EPOCH": 4}
    train_and_stop(config(tmp_path, None, **changes), STEPS)
    progress = trainer.train(config(tmp_path, None, **{**changes, "OPTIM__MAX_EPOCH": 3}))
    tested = [line["epoch"] for line in stats(tmp_path) if line["_type"] == "test_epoch"]
    assert tested == ["1/3", "2/4", "3/3"] and progress.tested_epoch == 3
    assert progress.test_err < 100


def test_other_data_under_the_same_name_is_warned_about(
    straight: Path, guide_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.train(config(straight, guide_file, DATA_LOADER__ROOT=str(tmp_path)))
    assert f"DATA_LOADER.ROOT: data -> {tmp_path}" in capsys.readouterr().err


def test_another_transform_is_rejected(straight: Path, guide_file: Path) -> None:
    with pytest.raises(ConfigError, match="INTER_TRANSFORM: linear -> attention"):
        trainer.train(config(straight, guide_file, DISTILLATION__INTER_TRANSFORM="attention"))


def test_a_batch_that_the_processes_cannot_divide_is_rejected(tmp_path: Path) -> None:
    cfg = config(tmp_path, None, TRAIN__ACCUM_STEPS=2)
    check_world(cfg, World(size=3))
    with pytest.raises(ConfigError, match=r"BATCH_SIZE is 30; with 4 processes .* multiple of 8"):
        check_world(cfg, World(size=4))
    mixed = config(tmp_path, None, TRAIN__MIXUP_ALPHA=0.8)
    check_world(mixed, World(size=3))
    with pytest.raises(
        ConfigError, match=r"BATCH_SIZE is 30; mixup .* 2 processes .* multiple of 4"
    ):
        check_world(mixed, World(size=2))


def test_the_checkpoint_of_another_model_is_rejected(straight: Path, guide_file: Path) -> None:
    wider = {"TRANSFORMER__HIDDEN_DIM": 32}
    with pytest.raises(ConfigError, match=r"HIDDEN_DIM: \d+ -> 32"):
        trainer.train(config(straight, guide_file, **wider))
    with pytest.raises(CheckpointError, match=r"Cannot resume.*of another shape"):
        trainer.train(config(straight, guide_file, **wider, TRAIN__RESUME_CHANGED=True))


def test_a_new_run_beside_old_checkpoints_is_rejected(straight: Path, guide_file: Path) -> None:
    with pytest.raises(ConfigError, match="AUTO_RESUME"):
        trainer.train(config(straight, guide_file, TRAIN__AUTO_RESUME=False))


def test_accumulation_does_not_change_the_update(tmp_path: Path) -> None:
    # Without dropout, images do not affect each other: splitting a batch changes rounding only.
    states = []
    for count in (1, 3):
        changes = {"TRAIN__ACCUM_STEPS": count, "TRANSFORMER__DROP_RATE": 0.0}
        changes |= {"TRANSFORMER__DROP_PATH_RATE": 0.0, "OPTIM__MAX_EPOCH": 1}
        changes |= {"OPTIM__OPTIMIZER": "sgd", "OPTIM__WARMUP_EPOCHS": 0}
        trainer.train(config(tmp_path / str(count), None, **changes))
        states.append(final_state(tmp_path / str(count), epoch=1)["model_state"])
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, done = trainer.train_step, []

    def poisoned(run: Any, *args: Any, **kwargs: Any) -> Any:
        result = train_step(run, *args, **kwargs)
        done.append(1)
        if len(done) == STEPS + 1:
            with torch.no_grad():
                run.guided.student.net.head.weight.fill_(float("nan"))
        return result

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"epoch 2, step 2: .*cls = nan"):
        trainer.train(config(tmp_path, None))
    state = final_state(tmp_path, epoch=1)
    assert all(v.isfinite().all() for v in state["model_state"].values())


def test_config_errors_are_raised_before_anything_is_built(
    tmp_path: Path, guide_file: Path
) -> None:
    faults = {
        "MODEL.NUM_CLASSES is 11, .* 10": {"MODEL__NUM_CLASSES": 11},
        "TRAIN.BATCH_SIZE is 600, .* 120": {"TRAIN__BATCH_SIZE": 600},
        "IN_CHANNELS is 2": {"MODEL__IN_CHANNELS": 2},
        "TRAIN.WEIGHTS is '/nowhere": {"TRAIN__WEIGHTS": "/nowhere/model.pyth"},
    }
    for message, changes in faults.items():
        with pytest.raises(ConfigError, match=message):
            trainer.train(config(tmp_path / "out", guide_file, **changes))
    with pytest.raises(ConfigError, match=r"TEACHER_WEIGHTS is '/gone/model\.pyth', which"):
        trainer.train(config(tmp_path / "out", Path("/gone/model.pyth")))
    assert not (tmp_path / "out").exists()


def test_training_continues_at_another_image_size(tmp_path: Path, guide_file: Path) -> None:
    """With a learning rate of almost 0, only the positions change: 17 tokens become 37."""
    trainer.train(config(tmp_path / "small", guide_file, OPTIM__MAX_EPOCH=1))
    rate = {"OPTIM__MAX_EPOCH": 1, "OPTIM__BASE_LR": 1e-12, "OPTIM__MIN_LR": 0.0}
    start = {"TRAIN__WEIGHTS": tmp_path / "small/model.pyth", "MODEL__IMG_SIZE": 24}
    trainer.train(config(tmp_path / "large", guide_file, **start, **rate))
    log = (tmp_path / "large/log.txt").read_text(encoding="utf-8")
    assert "TRAIN.WEIGHTS: pos_embed resampled from [1, 17, 24] to [1, 37, 24]." in log
    before, after = (
        read_checkpoint(tmp_path / name / "model.pyth")["model_state"]
        for name in ("small", "large")
    )
    assert list(after) == list(before)
    positions = (before.pop("pos_embed"), after.pop("pos_embed"))
    assert [table.shape[1] for table in positions] == [17, 37]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-8)


def test_weights_of_other_classes_are_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.train(config(tmp_path / "first", None, OPTIM__MAX_EPOCH=1))
    state = read_checkpoint(tmp_path / "first/model.pyth")
    torch.save({**state, "class_names": state["class_names"][::-1]}, tmp_path / "other.pyth")
    start = {"OPTIM__MAX_EPOCH": 1, "TRAIN__WEIGHTS": tmp_path / "other.pyth"}
    capsys.readouterr()
    trainer.train(config(tmp_path / "second", None, **start))
    said = "trained on the classes 9, 8, 7, 6, 5 and 5 more, not on 0, 1, 2, 3, 4 and 5 more"
    assert said in capsys.readouterr().err


def test_bf16_trains_in_bf16(tmp_path: Path, guide_file: Path) -> None:
    mixed = {"TRAIN__MIXED_PRECISION": True, "TRAIN__AMP_DTYPE": "bf16"}
    trainer.train(config(tmp_path, guide_file, **mixed, OPTIM__MAX_EPOCH=1))
    exact = config(tmp_path / "exact", guide_file, OPTIM__MAX_EPOCH=1)
    trainer.train(exact)
    losses = [
        next(line["loss"] for line in stats(d) if line["_type"] == "train_epoch")
        for d in (tmp_path, tmp_path / "exact")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]


@pytest.mark.parametrize("kind", ["muon", "nadamuon"])
def test_resume_with_muon_is_exact(kind: str, tmp_path: Path, guide_file: Path) -> None:
    straight, resumed = (
        config(tmp_path / name, guide_file, OPTIM__OPTIMIZER=kind, OPTIM__MAX_EPOCH=2)
        for name in ("straight", "resumed")
    )
    trainer.train(straight)
    train_and_stop(resumed, 2)
    torch.manual_seed(99)
    trainer.train(resumed)
    left, right = (final_state(tmp_path / name, epoch=2) for name in ("straight", "resumed"))
    assert_same(right, left)
    assert left["optimizer_state"]["state"]


# --- Schedules of guidance ----------------------------------------------------------------------

# The window is one epoch, so guidance can end after two. The loss falls by less than 100 per epoch.
ADAPTIVE = {
    "DISTILLATION__SCHEDULE": "adaptive",
    "DISTILLATION__ADAPTIVE_THRESHOLD": -1.0,
    "DISTILLATION__INTER_STUDENT_INDEX": "mix",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, guide_file: Path) -> Path:
    out_dir = tmp_path_factory.mktemp("ended")
    trainer.train(config(out_dir, guide_file, **ADAPTIVE))
    return out_dir


def test_after_the_end_nothing_is_imitated_and_the_heads_stay(ended: Path) -> None:
    epochs = [line for line in stats(ended) if line["_type"] == "train_epoch"]
    assert [line["guidance_factor"] for line in epochs] == [1, 1, 0]
    steps = [line for line in stats(ended) if line["_type"] == "train_iter"]
    assert [line["inter_distill_loss"] > 0 for line in steps] == [
        True,
        True,
        True,
        False,
    ]  # steps 1-3 to 10-12
    before, after = final_state(ended, epoch=2), final_state(ended)
    assert after["schedule_state"]["ended"] == 2 == len(after["schedule_state"]["losses"])
    assert_same(after["guidance_state"], before["guidance_state"])  # no decay, no momentum
    key = "layers.0.mlp.fc1.weight"
    assert not torch.equal(after["model_state"][key], before["model_state"][key])
    # The weights of the mixture have learned until then.
    learned = after["guidance_state"]["scores"].reshape(2, 2).softmax(dim=1)
    assert (learned != 0.5).all()
    for line in epochs[1:]:
        rounded = torch.tensor(line["mixture"])
        torch.testing.assert_close(rounded, learned, atol=1e-4, rtol=0)
    text = (ended / "log.txt").read_text()
    assert text.count("Guidance ended after epoch 2 of 3 (DISTILLATION.SCHEDULE)") == 1


def test_the_guide_does_not_run_after_the_end(
    tmp_path: Path, guide_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, forward = [], FrozenTeacher.forward

    def counted(self: Any, *args: Any) -> Any:
        runs.append(1)
        return forward(self, *args)

    monkeypatch.setattr(FrozenTeacher, "forward", counted)
    changes = {"DISTILLATION__SCHEDULE": "until", "DISTILLATION__SCHEDULE_EPOCH": 1}
    trainer.train(config(tmp_path, guide_file, **changes))
    assert len(runs) == STEPS


# Within the second epoch, at its end, and within the third, after guidance has ended.
@pytest.mark.parametrize("steps", [6, 8, 10])
def test_resume_with_an_adaptive_schedule_is_exact(
    steps: int, ended: Path, tmp_path: Path, guide_file: Path
) -> None:
    cfg = config(tmp_path, guide_file, **ADAPTIVE)
    train_and_stop(cfg, steps)
    torch.manual_seed(99)
    trainer.train(cfg)
    assert_same(final_state(tmp_path), final_state(ended))
    assert_same(stats(tmp_path), stats(ended))
