"""The pictures and the table that a training leaves in its folder.

The main process writes them, each whole or not at all. What cannot be written is reported once and
never ends a training.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lg.augment.batched import to_pixels
from lg.augment.preprocessing import Preprocessing
from lg.files.atomic import write_atomically
from lg.logs import plots
from lg.logs.log import RunLog
from lg.metrics import EvalResult

MIXTURE = "mixture/"  # beginning of the columns of INTER_STUDENT_INDEX mix
MAX_IMAGES = 16  # in train_batch.jpg
_MAX_SHARE = 100  # drawing curves takes at most one part in this many of the time
_FIRST_DELAY = 60.0  # seconds until curves are drawn for the first time
_LOSSES = {
    "loss": "total",
    "cls_loss": "classification",
    "inter_distill_loss": "feature imitation",
    "logit_distill_loss": "logit imitation",
}


class Pictures:
    """Writes results.csv, curves.png, mixture.png, train_batch.jpg and confusion_matrix.png."""

    def __init__(
        self,
        log: RunLog,
        class_names: Sequence[str],
        *,
        preprocessing: Preprocessing | None = None,
        enabled: bool = True,
    ) -> None:
        """Nothing is written before there is something to show.

        Args:
            log: Of the run, whose folder is written to; only an enabled log belongs to the main
                process.
            class_names: K names.
            preprocessing: Of the images; by default with ImageNet's mean.
            enabled: LOG_PICTURES.
        """
        self.log, self.class_names = log, list(class_names)
        self._preprocessing = preprocessing or Preprocessing(image_size=1)
        self.enabled = enabled and log.enabled
        self._rows: list[dict[str, Any]] | None = None  # of results.csv, once it has been read
        self._row: dict[str, Any] = {}
        self._drawn, self._seconds = time.perf_counter(), _FIRST_DELAY / _MAX_SHARE
        self._failed: set[str] = set()

    def train_row(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write the row of an epoch (counted from 1) that was trained."""
        self._row = {"epoch": epoch, **values}
        self._write("results.csv", self._write_row)

    def test_row(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add a test to the row of its epoch, which `end_epoch` writes."""
        if self._row.get("epoch") != epoch:
            self._row = {"epoch": epoch}
        self._row.update(values)

    def end_epoch(self, *, is_last: bool) -> None:
        """Write the row of the epoch, and draw the curves if that is due."""
        if not self.enabled or not self._row:
            return
        self._write("results.csv", self._write_row)
        started = time.perf_counter()
        if is_last or started - self._drawn > _MAX_SHARE * self._seconds:
            self._write("curves.png", self._draw_curves)
            if any(key.startswith(MIXTURE) for key in self._row):
                self._write("mixture.png", self._draw_mixture)
            self._drawn = time.perf_counter()
            self._seconds = self._drawn - started

    def train_batch(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        """Draw the first images of a batch as the model sees them, with their labels.

        Args:
            images: [N, C, S, S], mixed and normalised.
            targets: [N, K].
        """

        def draw(stream: Any) -> None:
            mean, std = self._preprocessing.mean, self._preprocessing.std
            pixels = to_pixels(images[:MAX_IMAGES], mean, std).cpu().numpy()
            captions = [self._caption(row) for row in targets[:MAX_IMAGES].cpu()]
            height = 2.1 * -(-len(pixels) // 4)
            plots.save_figure(
                stream, 8, height, plots.draw_images, pixels, captions, format="jpeg", dpi=110
            )

        self._write("train_batch.jpg", draw)

    def confusion_matrix(self, result: EvalResult, *, split: str, when: str) -> None:
        """Draw the confusion matrix of a test.

        Args:
            result: The result of the test.
            split: Name of what was tested.
            when: Which weights were tested, such as "epoch 3".
        """

        def draw(stream: Any) -> None:
            # The last column counts images whose logits were not finite.
            counts = np.array(result.confusion)[:, : len(self.class_names)]
            size = min(4.5 + 0.28 * len(counts), 13)
            title = f"{split}, {when}: top-1 {100 - result.top1_err:.2f} %"
            args = plots.draw_confusion, counts, self.class_names, title
            plots.save_figure(stream, size + 1, size, *args, format="png", dpi=110)

        self._write("confusion_matrix.png", draw)

    def _caption(self, target: torch.Tensor) -> str:
        """Name the labels of an image; with their shares if it is a mixture."""
        floor = float(target.min())  # label smoothing
        shares = (target - floor) / max(float((target - floor).sum()), 1e-9)
        values, classes = shares.topk(min(2, len(shares)))
        names = [self.class_names[k][:22] for k in classes.tolist()]
        if len(names) == 1 or values[1] < 0.005:
            return names[0]
        pairs = zip(names, values.tolist(), strict=True)
        return "\n".join(f"{name}: {100 * value:.0f} %" for name, value in pairs)

    def _write_row(self, stream: Any) -> None:
        if self._rows is None:  # of the run that is resumed
            self._rows = self._read_rows()
        if "lr" not in self._row:  # only the test of this epoch was repeated
            same = (row for row in self._rows if int(row["epoch"]) == self._row["epoch"])
            self._row = {**next(same, {}), **self._row}
        # Epochs that are trained again after a crash replace their rows.
        self._rows = [row for row in self._rows if int(row["epoch"]) < self._row["epoch"]]
        self._rows.append(self._row)
        columns = dict.fromkeys(key for row in self._rows for key in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, [*columns], lineterminator="\n")
        writer.writeheader()
        for row in self._rows:
            shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(shown)
        stream.write(text.getvalue().encode())

    def _read_rows(self) -> list[dict[str, Any]]:
        path = self.log.out_dir / "results.csv"
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as stream:
            rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(stream)]
        return [row for row in rows if str(row.get("epoch", "")).isdigit()]

    def _draw_curves(self, stream: Any) -> None:
        losses = {name: self._series(key) for key, name in _LOSSES.items()}
        accuracies = {
            "training images": self._series("train_top1_err", accuracy=True),
            "tested images": self._series("test_top1_err", accuracy=True),
            "tested images, weight average": self._series("ema_top1_err", accuracy=True),
        }
        panels = {
            "loss": {name: line for name, line in losses.items() if line[0]},
            "top-1 accuracy, %": {name: line for name, line in accuracies.items() if line[0]},
            "learning rate": {"lr": self._series("lr")},
        }
        args = plots.draw_curves, panels
        plots.save_figure(stream, 12, 3.6, *args, format="png", dpi=110)

    def _draw_mixture(self, stream: Any) -> None:
        rows = [row for row in self._rows or [] if any(key.startswith(MIXTURE) for key in row)]
        keys = [key for key in rows[-1] if key.startswith(MIXTURE)]
        stages = len({key.partition("_block_")[0] for key in keys})
        # [epochs, stages, blocks], in the order of the columns
        weights = np.array([[float(row[key]) for key in keys] for row in rows])
        weights = weights.reshape(len(rows), stages, -1)
        args = plots.draw_mixture, weights, [int(row["epoch"]) for row in rows]
        plots.save_figure(stream, 3.2 + 3 * stages, 3.6, *args, format="png", dpi=110)

    def _series(self, key: str, *, accuracy: bool = False) -> tuple[list[float], list[float]]:
        rows = [row for row in self._rows or [] if key in row]
        values = [float(row[key]) for row in rows]
        return [int(row["epoch"]) for row in rows], [100 - v if accuracy else v for v in values]

    def _write(self, name: str, write: Callable[[Any], None]) -> None:
        """Write a file of the run's folder; report the first failure of each."""
        if not self.enabled:
            return
        try:
            write_atomically(self.log.out_dir / name, write)
        except Exception as error:  # matplotlib raises many types
            if name not in self._failed:
                self._failed.add(name)
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                self.log.warn(f"{name} cannot be written ({reason}). Training continues.")
