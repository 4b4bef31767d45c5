"""`--mode export`: write a trained model for use without this project, checked on real images."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from lg import __version__, builders, trainer
from lg.config import with_values
from lg.datasets.base import evenly_spaced
from lg.errors import DataError, ExportError, UserError, first_line
from lg.files.atomic import TEMPORARY
from lg.paths import is_local_file
from lg.tools.export_formats import FORMATS, Source, check_packages, timm_recipe
from lg.tools.predict import Predictor, build_predictor, find_images

MIN_IMAGES, MAX_IMAGES = 8, 32  # number of images that an export is checked on
# Allowed difference of the logits: a part of their spread over the images, which rounding is far
# below (1e-7 to 1e-5), and of the largest logit, for models whose logits hardly vary.
TOLERANCE, ROUNDING = 1e-4, 2e-6


@dataclass(frozen=True)
class Parity:
    """How the logits of an exported model differ from those of the model itself.

    Attributes:
        difference: Largest absolute difference.
        spread: Largest absolute deviation of a logit from its mean over the images.
        largest: Largest absolute logit.
        num_equal: Images with the same most probable class.
        count: Images.
    """

    difference: float
    spread: float
    largest: float
    num_equal: int
    count: int

    @property
    def is_met(self) -> bool:
        """Whether the export computes the same up to rounding; False for NaN."""
        return self.difference <= TOLERANCE * self.spread + ROUNDING * self.largest

    def __str__(self) -> str:
        return (
            f"largest difference of the logits {self.difference:.1e} "
            f"({self.difference / self.spread:.1e} of their spread), same class for "
            f"{self.num_equal} of {self.count} images"
        )


@dataclass(frozen=True)
class Exported:
    """A written export.

    Attributes:
        place: The file or folder.
        num_bytes: Its size.
        seconds: To write, load and compare it.
        parity: The comparison.
    """

    place: Path
    num_bytes: int
    seconds: float
    parity: Parity


def export(
    cfg: CfgNode, *, formats: Sequence[str], out: str | None, images: list[str]
) -> list[Exported]:
    """Export TEST.WEIGHTS, by default the best weights of OUT_DIR, without guide and heads.

    A file gets its name only after its logits were compared with those of the model.

    Args:
        cfg: The config of the model; TEST.WEIGHTS names its weights.
        formats: Names in `FORMATS`.
        out: Folder to write to; None for `export` beside the weights.
        images: Files, folders and patterns to compare with; none for the test images.

    Returns:
        What was written, in the order of `formats`.

    Raises:
        ConfigError: There are no weights, or timm has no such model.
        DataError: There are fewer than MIN_IMAGES images.
        ExportError: A package is missing, or an export computes something else.
    """
    check_packages(formats)
    # Exports are made on a CPU in full precision.
    values = {"DEVICE": "cpu", "TRAIN.MIXED_PRECISION": False, "DATA_LOADER.DOWNLOAD": False}
    cfg = with_values(cfg, values)
    recipe = timm_recipe(cfg) if "timm" in formats else None
    predictor = build_predictor(cfg)
    batch = _check_batch(cfg, predictor, images)
    channels, height, width = batch.shape[1:]
    facts = describe(cfg, predictor)
    source = Source(predictor.model, (channels, height, width), facts, recipe)
    weights = trainer.tested_weights(cfg)
    folder = Path(out or _default_folder(cfg, weights))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in dict.fromkeys(formats):
        started = time.perf_counter()
        place, parity = write_checked(source, name, folder, batch)
        files = [place] if place.is_file() else list(place.iterdir())
        size, seconds = sum(f.stat().st_size for f in files), time.perf_counter() - started
        print(f"{name}: {place} ({size / 1e6:.1f} MB, {seconds:.0f} s)\n  {parity}", flush=True)
        written.append(Exported(place, size, seconds, parity))
    return written


def write_checked(
    source: Source, name: str, folder: Path, images: torch.Tensor
) -> tuple[Path, Parity]:
    """Write one format, compare it with the model, and only then give it its name.

    Args:
        source: The model.
        name: In `FORMATS`.
        folder: Where to write; exists.
        images: [N, C, S, S], N at least MIN_IMAGES.

    Returns:
        The file or folder, and the comparison.

    Raises:
        ExportError: The model cannot be exported, or the logits differ. Nothing is left; an earlier
            export of that name stays.
    """
    form = FORMATS[name]
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as temporary:
        fresh = Path(temporary) / form.place
        try:
            form.write(source, fresh)
        except (UserError, OSError):
            raise
        except Exception as error:  # torch raises many types for code that it cannot record
            raise ExportError(
                f"This model cannot be exported to {name} ({first_line(error)}). Try another "
                "--format."
            ) from error
        parity = compare(source.model, form.load(fresh), images)
        if not parity.is_met:
            raise ExportError(
                f"The {name} export is removed, because its logits differ from the "
                f"model's: {parity}. Try another --format, or another version of torch."
            )
        place = folder / form.place
        if fresh.is_dir():
            place.mkdir(exist_ok=True)
            for file in sorted(fresh.iterdir()):
                os.replace(file, place / file.name)
        else:
            os.replace(fresh, place)
    return place, parity


@torch.no_grad()
def compare(
    model: nn.Module, exported: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor
) -> Parity:
    """Compare the logits of a model and its export on images [N, C, S, S].

    The export gets batches of 1 and N - 1 images, which are other sizes than that of its example.

    Raises:
        ExportError: The model gives all images (nearly) the same logits, which shows nothing.
    """
    expected = model(images)
    largest = float(expected.abs().max())
    spread = float((expected - expected.mean(dim=0)).abs().max())
    if not spread > 100 * ROUNDING * largest:
        raise ExportError(
            "The model gives the same logits for all images, so an export of it cannot be checked: "
            "train it first."
        )
    actual = torch.cat([exported(images[:1]), exported(images[1:])])
    return Parity(
        difference=float((actual - expected).abs().max()),
        spread=spread,
        largest=largest,
        num_equal=int((actual.argmax(dim=1) == expected.argmax(dim=1)).sum()),
        count=len(images),
    )


def describe(cfg: CfgNode, predictor: Predictor) -> dict[str, str]:
    """Return the metadata that users of the exported model need; lists and numbers as JSON."""
    preparation, channels = predictor.preprocessing, cfg.MODEL.IN_CHANNELS
    color = "RGB / 255" if channels == 3 else "gray from 0 to 1"
    size, num_classes = preparation.image_size, len(predictor.class_names)
    facts = {
        "input": f"images: float32 [N, {channels}, {size}, {size}], {color}, minus mean, / std",
        "output": f"logits: float32 [N, {num_classes}], softmax gives probabilities",
        "image_size": size,
        "resize": preparation.resize,
        "interpolation": "bicubic",
        "mean": preparation.mean,
        "std": preparation.std,
        "window": cfg.DATA_LOADER.WINDOW,
        "class_names": predictor.class_names,
        "model": cfg.MODEL.TYPE,
        "lg_version": __version__,
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in facts.items()
    }


def _default_folder(cfg: CfgNode, weights: str) -> str:
    beside = os.path.dirname(weights) if is_local_file(weights) else cfg.OUT_DIR
    return os.path.join(beside, "export")


def _check_batch(cfg: CfgNode, predictor: Predictor, places: list[str]) -> torch.Tensor:
    """Return input [N, C, S, S] to check the export with, spread over the images that there are.

    Raises:
        DataError: There are fewer than MIN_IMAGES, or they cannot be read.
    """
    if places:
        paths = find_images(places)
        _check_count(len(paths), "--images names")
        return predictor.prepare([paths[k] for k in evenly_spaced(len(paths), MAX_IMAGES)])
    try:
        dataset = builders.build_test_data(cfg)
        for note in builders.data_notes(dataset):
            print(f"Warning: {note}.", file=sys.stderr, flush=True)
        _check_count(len(dataset), f"{dataset} has")
        chosen = evenly_spaced(len(dataset), MAX_IMAGES)
        return predictor.prepare_converted([dataset.image(index) for index in chosen])
    except (UserError, OSError) as error:
        raise DataError(
            f"An export is checked on real images, but the test images cannot be used: {error} "
            f"Name at least {MIN_IMAGES} images (files or a folder) with --images."
        ) from None


def _check_count(count: int, where: str) -> None:
    if count < MIN_IMAGES:
        raise DataError(f"{where} {count} images; the check needs at least {MIN_IMAGES}.")
