"""The table and the pictures of a training: their numbers, resume, failures."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from lg import trainer
from lg.augment.batched import normalise, to_pixels
from lg.logs import plots
from lg.logs.pictures import Pictures
from lg.signals import Interrupted
from tests.run_cases import assert_same, config, final_state, stats, train_and_stop

NAMES = ("results.csv", "curves.png", "train_batch.jpg", "confusion_matrix.png")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as stream:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, guide_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    trainer.train(config(folder, guide_file, LOG_PICTURES=True))
    return folder


def test_the_table_has_the_numbers_of_the_log(drawn: Path) -> None:
    found, lines = rows(drawn), stats(drawn)
    assert [row["epoch"] for row in found] == ["1", "2", "3"]
    trained = [line for line in lines if line["_type"] == "train_epoch"]
    for kind in ("test", "ema"):
        name = "test_ema_epoch" if kind == "ema" else "test_epoch"
        tested = [line for line in lines if line["_type"] == name]
        for row, line in zip(found, tested, strict=True):
            for key in ("top1_err", "balanced_acc", "macro_f1", "calibration_err"):
                assert float(row[f"{kind}_{key}"]) == pytest.approx(line[key], rel=1e-3)
    for row, line in zip(found, trained, strict=True):
        for key in ("loss", "cls_loss", "inter_distill_loss", "lr"):
            assert float(row[key]) == pytest.approx(line[key], rel=1e-3)
        assert float(row["train_top1_err"]) == pytest.approx(line["top1_err"], rel=1e-3)
        total = float(row["cls_loss"]) + 2.5 * float(row["inter_distill_loss"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-3)


def test_the_pictures_are_images(drawn: Path) -> None:
    sizes = {}
    for name in NAMES[1:]:
        with Image.open(drawn / name) as image:
            sizes[name] = image.size
    assert all(min(size) > 300 for size in sizes.values())
    assert not list(drawn.glob(".partial*"))


def test_pictures_change_neither_training_nor_resume(
    drawn: Path, tmp_path: Path, guide_file: Path
) -> None:
    plain = tmp_path / "plain"
    trainer.train(config(plain, guide_file))
    assert not any((plain / name).exists() for name in NAMES)
    states = [final_state(folder) for folder in (plain, drawn)]
    for state in states:
        state.pop("cfg")
    assert_same(*states)
    train_and_stop(config(tmp_path, guide_file, LOG_PICTURES=True), 6)
    assert len(rows(tmp_path)) == 1
    trainer.train(config(tmp_path, guide_file, LOG_PICTURES=True))
    assert rows(tmp_path) == rows(drawn)
    assert (tmp_path / "confusion_matrix.png").read_bytes() == (
        drawn / "confusion_matrix.png"
    ).read_bytes()


def test_a_repeated_test_keeps_the_row_of_its_epoch(
    drawn: Path, tmp_path: Path, guide_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.TestMeter, "add", stop)
        with pytest.raises(Interrupted):
            trainer.train(config(tmp_path, guide_file, LOG_PICTURES=True))
    trainer.train(config(tmp_path, guide_file, LOG_PICTURES=True))
    assert rows(tmp_path) == rows(drawn)


def test_a_failing_picture_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise ValueError("no fonts")

    monkeypatch.setattr(plots, "save_figure", fail)
    (tmp_path / "results.csv").mkdir()
    trainer.train(config(tmp_path, None, LOG_PICTURES=True, OPTIM__MAX_EPOCH=2))
    said = capsys.readouterr()
    assert "Finished 2 epochs" in said.out
    for name in NAMES:
        assert said.err.count(f"Warning: {name} cannot be written") == 1
    assert "curves.png cannot be written (no fonts)" in said.err


def test_the_final_test_is_the_one_that_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        Pictures, "confusion_matrix", lambda _, result, **words: seen.append((result, words))
    )
    trainer.train(config(tmp_path, None, TRAIN__VAL_FRACTION=0.25, OPTIM__MAX_EPOCH=2))
    ((result, words),) = seen
    assert words["split"] == "digits/test" and words["when"].startswith("best epoch")
    confusion = np.array(result.confusion)
    assert confusion.shape == (10, 11) and confusion.sum() == result.count == 597
    assert 100 * confusion.trace() / 597 == pytest.approx(100 - result.top1_err)


def test_captions_name_both_images_of_a_mixture() -> None:
    log = type("Log", (), {"enabled": False})()
    pictures = Pictures(log, ["cat", "dog", "cow"])  # type: ignore[arg-type]
    smooth = torch.tensor([0.9, 0.0, 0.0]) + 0.1 / 3
    assert pictures._caption(smooth) == "cat"
    assert pictures._caption(torch.tensor([0.3, 0.7, 0.0])) == "dog: 70 %\ncat: 30 %"


def test_pixels_are_restored() -> None:
    pixels = torch.randint(0, 256, (2, 5, 5, 3), dtype=torch.uint8)
    assert torch.equal(to_pixels(normalise(pixels.permute(0, 3, 1, 2))), pixels)


@pytest.mark.parametrize("count", [30, 31])
def test_names_are_shown_up_to_thirty_classes(count: int) -> None:
    figure = Figure()
    plots.draw_confusion(figure, np.eye(count, dtype=int) * 7, [f"class {i}" for i in range(count)])
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert ("class 3" in labels) == (count == 30)
    assert [text.get_text() for text in axes.texts] == (["7"] * 30 if count == 30 else [])


def test_a_mixture_is_drawn_from_its_columns(
    tmp_path: Path, guide_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(
        tmp_path,
        guide_file,
        LOG_PICTURES=True,
        DISTILLATION__INTER_STUDENT_INDEX="mix",
        OPTIM__MAX_EPOCH=2,
    )
    drawn: list[tuple[np.ndarray, list[int]]] = []
    draw = plots.draw_mixture

    def spy(figure: Figure, weights: np.ndarray, epochs: list[int]) -> None:
        drawn.append((weights, epochs))
        draw(figure, weights, epochs)

    monkeypatch.setattr(plots, "draw_mixture", spy)
    trainer.train(cfg)
    (weights, epochs), lines = drawn[-1], stats(tmp_path)
    logged = [line["mixture"] for line in lines if line["_type"] == "train_epoch"]
    assert epochs == [1, 2] and weights.shape == (2, 2, 2)  # epochs, guide stages, blocks
    np.testing.assert_allclose(weights, np.array(logged, dtype=float), atol=1e-4)
    np.testing.assert_allclose(weights.sum(axis=2), 1, atol=1e-4)
    with Image.open(tmp_path / "mixture.png") as picture:
        assert picture.size == (1012, 396)
    # An epoch that is repeated after a resume replaces its row.
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]
