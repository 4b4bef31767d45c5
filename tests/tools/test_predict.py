"""Prediction: equal to testing, from the checkpoint alone, with classes matched by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lg
from lg import trainer
from lg.config import load_trained_config
from lg.errors import ConfigError, DataError
from lg.tools.predict import Predictions, find_images, predict

BASE = Path(__file__).parents[2] / "configs/digits/vit_digits_base.yaml"
CLASSES = ("b", "a", "c")  # colours red, green, blue
COLOURS = dict(zip(CLASSES, ((255, 0, 0), (0, 255, 0), (0, 0, 255)), strict=True))


def write_images(folder: Path, classes: dict[str, str], count: int) -> None:
    """Write noisy images of a colour; `classes` maps folder names to keys of COLOURS."""
    random = np.random.default_rng(0)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = random.integers(-60, 60, (20, 20, 3))
            pixels = np.clip(np.array(COLOURS[colour]) * 0.7 + 40 + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that tells three colours apart, and its images."""
    root = tmp_path_factory.mktemp("colours")
    for split in ("train", "test"):
        write_images(root / "data" / split, {name: name for name in CLASSES}, 12)
    opts = (
        f"TRAIN.DATASET image_folder TEST.DATASET image_folder DATA_LOADER.ROOT {root}/data "
        f"DATA_LOADER.BACKEND device MODEL.NUM_CLASSES 3 TRANSFORMER.DEPTH 1 TRAIN.BATCH_SIZE 12 "
        f"OPTIM.MAX_EPOCH 12 OPTIM.WARMUP_EPOCHS 0 TEST.PERIOD 12 TRAIN.STRONG_AUGMENTATION False "
        f"TRAIN.FRACTION 1.0 DEVICE cpu OUT_DIR {root}/run"
    )
    trainer.train(lg.load_config(BASE, opts.split()))
    return root


def options(trained: Path, **changes: str) -> list[str]:
    opts = [word for key, value in changes.items() for word in (key.replace("__", "."), value)]
    weights = str(trained / "run/model.pyth")
    return ["TEST.WEIGHTS", weights, "DEVICE", "cpu", *opts]


def evaluate(trained: Path, **changes: str) -> Predictions:
    opts = options(trained, **changes)
    return lg.evaluate(load_trained_config(opts[1], opts))


def test_prediction_equals_testing_from_the_checkpoint_alone(trained: Path) -> None:
    result = evaluate(trained)
    assert result.class_names == ["a", "b", "c"] and result.split == "image_folder/test"
    assert (
        result.probabilities.shape == (36, 3)
        and result.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    )
    accuracy = 100 * np.mean(result.probabilities.argmax(1) == result.labels)
    assert accuracy > 80
    opts = options(trained)
    error = trainer.test(load_trained_config(opts[1], opts)).top1_err
    assert error == pytest.approx(100 - accuracy)
    predictor = lg.load_predictor(opts[1], device="cpu")
    assert not predictor.model.training
    for image, expected in zip(predictor(result.images), result.probabilities, strict=True):
        np.testing.assert_allclose(image.probabilities, expected, atol=1e-6)
    one = predictor(Image.open(result.images[0]))
    np.testing.assert_allclose(one.probabilities, result.probabilities[0], atol=1e-6)
    assert one.top(1) == [(one.class_name, one.probability)] and one.image == ""


def test_flip_averages_both_views(trained: Path) -> None:
    path = str(next((trained / "data/test/a").iterdir()))
    image = Image.open(path).convert("RGB")
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    plain = lg.load_predictor(trained / "run/model.pyth", device="cpu")
    both = lg.load_predictor(trained / "run/model.pyth", device="cpu", flip=True)
    mean = np.mean([each.probabilities for each in plain([image, mirrored])], axis=0)
    np.testing.assert_allclose(both(path).probabilities, mean, atol=1e-5)


def test_an_external_folder_is_matched_by_name(trained: Path, tmp_path: Path, capsys) -> None:
    """Neither train/ nor all classes are there; sorted names alone would swap the labels."""
    write_images(tmp_path / "test", {"b": "b", "c": "c"}, 6)
    result = evaluate(trained, DATA_LOADER__ROOT=str(tmp_path))
    assert set(result.labels.tolist()) == {1, 2}
    assert np.mean(result.probabilities.argmax(1) == result.labels) > 0.8
    assert "has no images of 1 of 3 classes (a)" in capsys.readouterr().err
    flat = evaluate(trained, DATA_LOADER__ROOT=str(tmp_path / "test"))  # classes only
    assert flat.labels.tolist() == result.labels.tolist()


def test_unknown_classes_are_refused_by_name(trained: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "test", {"b": "b", "zebra": "c"}, 1)
    with pytest.raises(DataError, match=r"'zebra', which is not among those trained \(a, b, c\)"):
        evaluate(trained, DATA_LOADER__ROOT=str(tmp_path))


def test_other_builtin_sets_are_refused(trained: Path) -> None:
    with pytest.raises((DataError, ConfigError), match="other classes than the model: '0', '1'"):
        evaluate(trained, TRAIN__DATASET="digits", TEST__DATASET="digits")


def test_older_checkpoints_predict_numbers(trained: Path, tmp_path: Path) -> None:
    state = torch.load(trained / "run/model.pyth", weights_only=True)
    assert state.pop("class_names") == ["a", "b", "c"]
    torch.save(state, tmp_path / "old.pyth")
    predictor = lg.load_predictor(tmp_path / "old.pyth", device="cpu")
    assert predictor.class_names == ["0", "1", "2"]


def test_files_are_written_and_unreadable_images_named(trained: Path, tmp_path: Path, capsys):
    write_images(tmp_path / "photos", {"x": "c"}, 3)
    (tmp_path / "photos/x/bad.png").write_text("no image")
    opts = options(trained)
    cfg = load_trained_config(opts[1], opts)
    for suffix in (".csv", ".jsonl"):
        out = str(tmp_path / f"out{suffix}")
        predict(cfg, images=[str(tmp_path / "photos")], out=out, top=2, flip=False)
    output = capsys.readouterr()
    assert "bad.png" in output.err and f"3 images classified, 1 skipped. Written to {out}." in (
        output.out
    )
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["class_1"] for row in rows] == [line["class"] for line in lines] == ["c"] * 3
    assert sum(lines[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    for out, top, match in (("a.txt", 1, "--out is a.txt"), (None, 0, "--top is 0")):
        with pytest.raises(ConfigError, match=match):
            predict(cfg, images=[str(tmp_path)], out=out, top=top, flip=False)


def test_places_are_files_folders_and_patterns(tmp_path: Path) -> None:
    write_images(tmp_path, {"x": "a", ".hidden": "a"}, 2)
    (tmp_path / "x/notes.txt").write_text("")
    files = [str(tmp_path / f"x/{k}.png") for k in (0, 1)]
    assert find_images([str(tmp_path)]) == files
    assert find_images([f"{tmp_path}/*/*.png", files[0]]) == files
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_images([f"{tmp_path}/nowhere"])


def test_another_run_in_the_folder_is_refused(trained: Path) -> None:
    weights = trained / "run/model.pyth"
    with pytest.raises(ConfigError, match=r"RNG_SEED: 1 -> 5\. Set OUT_DIR to a new folder"):
        trainer.train(load_trained_config(weights, ["RNG_SEED", "5"]))
    cfg = load_trained_config(weights, ["RNG_SEED", "5", "TRAIN.RESUME_CHANGED", "True"])
    trainer.train(cfg)  # finished: reports the result


def test_weights_are_downloaded_into_the_cache_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def read(path: str, *, cache: str) -> dict[str, Any]:
        seen.append(cache)
        return {"cfg": "DOWNLOAD_CACHE: /of/the/trainer"}

    monkeypatch.setattr("lg.checkpoint.read_checkpoint", read)
    found = [
        load_trained_config("http://a/b.pyth", opts).DOWNLOAD_CACHE
        for opts in ([], ["DOWNLOAD_CACHE", "'/big disk'"])
    ]
    assert found == seen == ["/tmp/pycls-download-cache", "/big disk"]
