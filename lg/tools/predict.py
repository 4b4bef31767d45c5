"""`--mode predict`: classify images with a trained model; the same from Python."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from yacs.config import CfgNode

from lg import builders, trainer
from lg.augment.batched import BatchTestTransform
from lg.augment.preprocessing import Preprocessing
from lg.checkpoint import load_weights
from lg.config import load_trained_config
from lg.datasets.base import ImageDataset
from lg.datasets.image import PixelFormat, pixel_tensor
from lg.datasets.image_folder import SUFFIXES
from lg.datasets.loader import stack
from lg.device import Precision
from lg.distributed import World
from lg.errors import ConfigError, DataError
from lg.files.atomic import write_text
from lg.metrics import EvalResult, TestMeter

AnyImage = str | os.PathLike[str] | Image.Image


@dataclass(frozen=True)
class Prediction:
    """The class probabilities of an image.

    Attributes:
        image: Its path; empty for an image that came without one.
        probabilities: [K] float32, sum 1.
        class_names: K names.
    """

    image: str
    probabilities: np.ndarray
    class_names: list[str]

    @property
    def class_name(self) -> str:
        """The most probable class."""
        return self.class_names[int(self.probabilities.argmax())]

    @property
    def probability(self) -> float:
        """Its probability."""
        return float(self.probabilities.max())

    def top(self, count: int) -> list[tuple[str, float]]:
        """Return the most probable classes with their probabilities, at most `count`."""
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.class_names[k], float(self.probabilities[k])) for k in order]


@dataclass(frozen=True)
class Predictions:
    """The predictions for a labelled set.

    Attributes:
        probabilities: [N, K] float32.
        predicted: [N] int64, the class that counts as predicted; -1 if logits are not finite.
        labels: [N] int64, in 0..K-1.
        images: N paths or other names.
        class_names: K names.
        split: Name of the set, such as flowers/test.
    """

    probabilities: np.ndarray
    predicted: np.ndarray
    labels: np.ndarray
    images: list[str]
    class_names: list[str]
    split: str


class Predictor:
    """Classifies images as a test of the model does. Made by `load_predictor`."""

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        *,
        preprocessing: Preprocessing,
        pixel_format: PixelFormat,
        precision: Precision,
        batch_size: int,
        flip: bool,
    ) -> None:
        """Put the model into evaluation mode.

        Args:
            model: On the device of `precision`.
            class_names: K names, in the order of the logits.
            preprocessing: Of the images.
            pixel_format: What images are converted to.
            precision: Of the model.
            batch_size: Images that are classified at once.
            flip: Average the probabilities of each image and its mirror image.
        """
        self.model = model.eval()
        self.class_names = list(class_names)
        self.preprocessing = preprocessing
        self.precision, self.batch_size, self.flip = precision, batch_size, flip
        self._pixel_format = pixel_format
        self._transform = BatchTestTransform(**vars(preprocessing))

    def __call__(self, images: AnyImage | Sequence[AnyImage]) -> Prediction | list[Prediction]:
        """Classify an image or a list of images, each a path or a PIL image.

        Returns:
            A Prediction for one image, a list for several.

        Raises:
            DataError: An image cannot be read.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)):
            return self._classify([images])[0]
        return [
            prediction
            for first in range(0, len(images), self.batch_size)
            for prediction in self._classify(images[first : first + self.batch_size])
        ]

    def prepare(self, images: Sequence[AnyImage]) -> torch.Tensor:
        """Return images as the model's input [N, C, S, S], in host memory.

        Raises:
            DataError: An image cannot be read.
        """
        pixel_format = self._pixel_format
        return self.prepare_converted(
            [
                pixel_format.convert(image.copy())
                if isinstance(image, Image.Image)
                else pixel_format.open(image)
                for image in images
            ]
        )

    def prepare_converted(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return images in the model's pixel format, as data sets hold them, as its input."""
        pixels = [pixel_tensor(self._transform.prepare(image)) for image in images]
        count = len(images)
        return self._transform(stack(pixels), epochs=[0] * count, index=range(count))[0]

    @torch.no_grad()
    def _classify(self, images: Sequence[AnyImage]) -> list[Prediction]:
        batch = self.prepare(images).to(self.precision.device)
        with self.precision.autocast():
            views = [batch, batch.flip(-1)] if self.flip else [batch]
            scores = [self.model(view).float().softmax(dim=1) for view in views]
        probabilities = torch.stack(scores).mean(dim=0).cpu().numpy()
        names = ["" if isinstance(image, Image.Image) else os.fspath(image) for image in images]
        return [
            Prediction(name, row, self.class_names)
            for name, row in zip(names, probabilities, strict=True)
        ]


def load_predictor(
    weights: str | os.PathLike[str], *, device: str = "auto", flip: bool = False
) -> Predictor:
    """Load a trained model with its class names and preprocessing.

    Args:
        weights: A checkpoint of this project, such as `work_dirs/RUN/model.pyth`.
        device: `auto`, `cpu`, `cuda` or `mps`.
        flip: Average the probabilities of each image and its mirror image.

    Raises:
        CheckpointError: The file cannot be read.
        ConfigError: It holds no config, or the config cannot be used.
    """
    opts = ["DEVICE", device, "TEST.WEIGHTS", os.fspath(weights)]
    return build_predictor(load_trained_config(weights, opts), flip=flip)


def build_predictor(cfg: CfgNode, *, flip: bool = False) -> Predictor:
    """Build the predictor of TEST.WEIGHTS, by default the best weights of OUT_DIR."""
    path = trainer.tested_weights(cfg)
    cfg = builders.with_trained_statistics(cfg, path, World())
    device = builders.build_device(cfg, World())
    model = builders.build_model(cfg, pretrained=False)
    facts = load_weights(model, path, cache=cfg.DOWNLOAD_CACHE)
    precision = builders.build_precision(cfg, device)
    builders.place_model(model, precision)
    names = facts.get("class_names") or [str(k) for k in range(cfg.MODEL.NUM_CLASSES)]
    return Predictor(
        model,
        names,
        preprocessing=builders.build_preprocessing(cfg),
        pixel_format=builders.build_pixel_format(cfg),
        precision=precision,
        batch_size=cfg.TEST.BATCH_SIZE,
        flip=flip,
    )


def evaluate(cfg: CfgNode) -> Predictions:
    """Return what TEST.WEIGHTS predicts for the images that `--mode test` tests, in this process.

    Raises:
        ConfigError: There are no weights.
        DataError: The images cannot be read, or have classes that the model does not know.
    """
    return evaluate_loaded(*trainer.load_tested(cfg, World()))[0]


@torch.no_grad()
def evaluate_loaded(
    cfg: CfgNode, model: nn.Module, dataset: ImageDataset, precision: Precision
) -> tuple[Predictions, EvalResult]:
    """Return what a model, on its device and left in evaluation mode, predicts for a set, and the
    result that `--mode test` prints."""
    model.eval()
    rows, predicted, meter = [], [], TestMeter(cfg.MODEL.NUM_CLASSES, precision.device)
    with closing(builders.build_test_loader(cfg, dataset, World(), precision.device)) as loader:
        for batch in loader:
            batch = batch.to(precision.device)
            with precision.autocast():
                logits = model(batch.images)
            predicted.append(meter.add(logits, batch.labels).cpu())
            rows.append(logits.float().softmax(dim=1).cpu())
    predictions = Predictions(
        probabilities=torch.cat(rows).numpy(),
        predicted=torch.cat(predicted).numpy(),
        labels=dataset.labels,
        images=[dataset.describe(index) for index in range(len(dataset))],
        class_names=dataset.class_names,
        split=str(dataset),
    )
    return predictions, meter.result()


def predict(cfg: CfgNode, *, images: list[str], out: str | None, top: int, flip: bool) -> None:
    """Print the most probable classes of images, and write them to a file.

    Args:
        cfg: The config of the model; TEST.WEIGHTS names its weights.
        images: Files, folders (searched with their subfolders) and patterns such as `a/*.jpg`.
        out: A .csv file (one row per image) or .jsonl file (with all probabilities) to write.
        top: Number of classes to print.
        flip: Average the probabilities of each image and its mirror image.

    Raises:
        ConfigError: `out` has another suffix, or `top` is not positive.
        DataError: There are no images, or none can be read.
    """
    suffix = Path(out or "").suffix
    if out is not None and suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"--out is {out}: use a name that ends in .csv or .jsonl.")
    if top < 1:
        raise ConfigError(f"--top is {top}: set it to 1 or more.")
    paths = find_images(images)
    predictor = build_predictor(cfg, flip=flip)
    top = min(top, len(predictor.class_names))
    width = min(max(map(len, paths)), 60)
    found: list[Prediction] = []
    skipped = 0
    for prediction in _predict_readable(predictor, paths):
        if isinstance(prediction, DataError):
            print(f"Warning: skipped {prediction}", file=sys.stderr, flush=True)
            skipped += 1
            continue
        found.append(prediction)
        cells = "  ".join(f"{name} {100 * p:.1f} %" for name, p in prediction.top(top))
        print(f"{prediction.image:<{width}}  {cells}", flush=True)
    if not found:
        raise DataError("no image can be read")
    if out is not None:
        write_text(out, _csv_text(found, top) if suffix == ".csv" else _json_lines(found))
    rest = f", {skipped:,} skipped" if skipped else ""
    print(f"{len(found):,} images classified{rest}.{f' Written to {out}.' if out else ''}")


def find_images(places: Sequence[str]) -> list[str]:
    """Return the image files of files, folders and patterns, in order.

    Raises:
        DataError: A place does not exist, or has no images.
    """
    found: dict[str, None] = {}
    for place in map(os.path.expanduser, places):
        matches = [place] if os.path.exists(place) else sorted(glob.glob(place, recursive=True))
        if not matches:
            raise DataError(f"{place} does not exist: check the path")
        files = [file for match in matches for file in _files_of(match)]
        if not files:
            raise DataError(f"{place} contains no images ({' '.join(SUFFIXES)})")
        found |= dict.fromkeys(files)
    return list(found)


def _files_of(place: str) -> list[str]:
    if not os.path.isdir(place):
        return [place]
    files = sorted(Path(place).rglob("*"))
    return [
        str(file)
        for file in files
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(place).parts)
    ]


def _predict_readable(predictor: Predictor, paths: list[str]) -> Iterator[Prediction | DataError]:
    """Yield the prediction of each image, or why it cannot be read."""
    for first in range(0, len(paths), predictor.batch_size):
        batch = paths[first : first + predictor.batch_size]
        try:
            found = predictor(batch)
            assert isinstance(found, list)
            yield from found
        except DataError:  # one by one, to find the unreadable ones
            for path in batch:
                try:
                    prediction = predictor(path)
                    assert isinstance(prediction, Prediction)
                    yield prediction
                except DataError as error:
                    yield error


def _csv_text(found: Sequence[Prediction], top: int) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["image", *(f"{c}_{k}" for k in range(1, top + 1) for c in ("class", "probability"))]
    )
    for each in found:
        cells = [cell for name, p in each.top(top) for cell in (name, f"{p:.6f}")]
        writer.writerow([each.image, *cells])
    return stream.getvalue()


def _json_lines(found: Sequence[Prediction]) -> str:
    rows = (
        {
            "image": each.image,
            "class": each.class_name,
            "probability": round(each.probability, 6),
            "probabilities": {n: round(p, 6) for n, p in each.top(len(each.class_names))},
        }
        for each in found
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
