"""The report: its numbers, its notes about what is missing, and how a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

import lg
from lg import trainer
from lg.builders import build_preprocessing
from lg.errors import ConfigError, DataError
from lg.logs.log import json_line
from lg.tools.intervals import wilson_interval
from lg.tools.predict import Predictions
from lg.tools.report import focus, mistakes, mixing, quality, report, results, samples
from lg.tools.report.runs import changed_settings, read_runs
from lg.tools.report.subject import Subject
from lg.tools.report.subject import test_runs as evaluate_runs

CONFIGS = Path(__file__).parents[2] / "configs/digits"
SMALL = (
    "TRANSFORMER.DEPTH 2 TRAIN.FRACTION 0.1 OPTIM.MAX_EPOCH 2 OPTIM.WARMUP_EPOCHS 0 "
    "TRAIN.BATCH_SIZE 50 TEST.PERIOD 1 DATA_LOADER.BACKEND device DEVICE cpu LOG_PICTURES False"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two short trainings, and the log of a third whose weights are gone."""
    root = tmp_path_factory.mktemp("runs")
    folders = [str(root / name) for name in ("slow & low", "fast", "lost")]
    for folder, rate in zip(folders, ("1e-4", "3e-3"), strict=False):
        opts = [*SMALL.split(), "OUT_DIR", folder, "OPTIM.BASE_LR", rate]
        trainer.train(lg.load_config(CONFIGS / "vit_digits_base.yaml", opts))
    (root / "lost").mkdir()
    shutil.copy(root / "fast/log.txt", root / "lost")
    return folders


@pytest.fixture(scope="module")
def page(runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(out_dirs=runs, out=str(path), opts=[])
    return path


def test_the_last_epoch_counts_only_if_it_was_tested_on_the_same_images(tmp_path: Path) -> None:
    opts = [*SMALL.split(), "OUT_DIR", str(tmp_path), "TRAIN.VAL_FRACTION", "0.25"]
    trainer.train(lg.load_config(CONFIGS / "vit_digits_base.yaml", opts))
    report(out_dirs=[str(tmp_path)], out=str(tmp_path / "report.html"), opts=[])
    html = (tmp_path / "report.html").read_text()
    row = html[html.index("last epoch</th>") :]
    row = row[row.index("<tbody>") : row.index("</tr>", row.index("<tbody>"))]
    assert "597" in row and row.endswith("&ndash;</td>")


def predictions(count: int = 400, num_classes: int = 7, seed: int = 0) -> Predictions:
    random = np.random.default_rng(seed)
    labels = np.random.default_rng(9).integers(0, num_classes, count)
    logits = random.normal(size=(count, num_classes)) + 2.0 * np.eye(num_classes)[labels]
    probabilities = torch.tensor(logits).float().softmax(dim=1).numpy()
    names = [f"class {k}" for k in range(num_classes)]
    images, predicted = [str(k) for k in range(count)], probabilities.argmax(axis=1)
    return Predictions(probabilities, predicted, labels, images, names, "set/test")


def test_the_numbers_of_a_test() -> None:
    result = predictions()
    hits = results.hits(result)
    # Wilson (1927) for 48 of 50: (p + z²/2n ± z √(pq/n + z²/4n²)) / (1 + z²/n).
    assert wilson_interval(48, 50) == pytest.approx((86.54, 98.90), abs=0.01)
    confusion = np.zeros((7, 7), dtype=int)
    np.add.at(confusion, (result.labels, result.probabilities.argmax(axis=1)), 1)
    assert confusion.trace() == hits.sum()
    rows = results.class_rows(result)
    assert rows[2].count == confusion[2].sum() and rows[2].name == "class 2"
    assert rows[2].recall == pytest.approx(100 * confusion[2, 2] / confusion[2].sum())
    assert rows[2].precision == pytest.approx(100 * confusion[2, 2] / confusion[:, 2].sum())
    bins = results.reliability(result)
    expected = multiclass_calibration_error(
        torch.tensor(result.probabilities), torch.tensor(result.labels), 7, n_bins=15
    )
    error = np.average(np.abs(bins.confidence - bins.accuracy), weights=bins.counts)
    assert error == pytest.approx(100 * float(expected), abs=1e-3)
    assert bins.counts.sum() == 400


@pytest.mark.parametrize("opts", [[], ["TRAIN.MIXED_PRECISION", "True", "TRAIN.AMP_DTYPE", "bf16"]])
def test_the_page_has_the_result_of_a_test(runs: list[str], opts: list[str]) -> None:
    """Logits in bf16 often tie; the page must break ties as the test does."""
    (subject,) = evaluate_runs(read_runs(runs[:1]), opts)
    assert subject.tested is not None
    expected = trainer.test(subject.tested.cfg)
    assert subject.tested.result.rates == expected.rates
    assert np.trace(np.array(expected.confusion)) == results.hits(subject.tested.predictions).sum()
    shown = (100 - expected.top1_err, 100 - expected.top5_err, expected.balanced_acc)
    cells = [f"{value:.2f} %" for value in (*shown, expected.macro_f1, expected.calibration_err)]
    row = quality.accuracy([subject])
    assert [cell for cell in re.findall(r"[\d.]+ %", row) if cell in cells][:5] == cells


def test_runs_are_compared_on_the_same_images() -> None:
    first, second = predictions(), predictions(seed=1)
    assert results.same_images(first, second)
    gap = results.difference(second, first)
    a, b = results.hits(first), results.hits(second)
    assert gap.points == pytest.approx(100 * (b.mean() - a.mean()))
    assert (gap.only_first, gap.only_second) == ((b & ~a).sum(), (a & ~b).sum())
    assert gap.low < gap.points < gap.high
    assert results.difference(first, first).p_value == 1.0
    assert not results.same_images(first, predictions(count=399))


def test_the_worst_mistakes_have_the_highest_loss() -> None:
    result = predictions()
    found = mistakes.worst_mistakes(result)
    chances = result.probabilities[np.arange(400), result.labels]
    wrong = np.flatnonzero(~results.hits(result))
    assert found.tolist() == wrong[np.argsort(chances[wrong])][:12].tolist()


def test_wrong_labels_are_suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(300) % 3
    probabilities = np.full((300, 3), 0.02, dtype=np.float32)
    probabilities[np.arange(300), labels] = 0.96
    swapped = [5, 77, 140]
    labels[swapped] = (labels[swapped] + 1) % 3
    names = [str(k) for k in range(300)]
    padded = np.pad(probabilities, ((0, 0), (0, 1)))  # a class that the test images lack
    predicted = padded.argmax(axis=1)
    result = Predictions(padded, predicted, labels, names, ["a", "b", "c", "d"], "set/test")
    pytest.importorskip("cleanlab")
    found, is_ranking = mistakes.suspected_labels(result)
    assert sorted(found.tolist()) == swapped and not is_ranking
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    found, is_ranking = mistakes.suspected_labels(result)
    assert sorted(found.tolist()) == swapped and is_ranking


def test_logs_tell_settings_and_epochs(runs: list[str], tmp_path: Path) -> None:
    slow, fast, lost = read_runs(runs)
    assert [run.name for run in (slow, fast, lost)] == ["slow & low", "fast", "lost"]
    assert changed_settings([slow, fast]) == {"OPTIM.BASE_LR": [1e-4, 3e-3]}
    assert fast.series("training", "lr")[0] == [1, 2] and fast.hours > 0
    assert fast.machine["hardware"].startswith("cpu ") and fast.machine["processes"] == 1
    # A resumed run trains epochs again; the last line of an epoch counts.
    again = {"epoch": "2/2", "loss": 7.5, "time_epoch": 1.0}
    (tmp_path / "log.txt").write_text(
        Path(runs[2], "log.txt").read_text() + json_line("train_epoch", again) + "\n"
    )
    assert read_runs([str(tmp_path)])[0].series("training", "loss")[1][1] == 7.5


def test_folders_without_a_run_are_refused(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no log\.txt. Name the OUT_DIR of a run"):
        read_runs([str(tmp_path)])
    with pytest.raises(DataError, match=r"Name the runs inside: .*fast"):
        read_runs([str(Path(runs[0]).parent)])
    with pytest.raises(DataError, match="give each run once"):
        read_runs([runs[0], f"{runs[0]}/"])
    (tmp_path / "log.txt").write_text("nothing\n")  # as with VERBOSE False
    shutil.copy(Path(runs[1], "config.yaml"), tmp_path)
    assert read_runs([str(tmp_path)])[0].config == read_runs([runs[1]])[0].config
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(DataError, match="has no config"):
        read_runs([str(tmp_path)])


class Reader(HTMLParser):
    """Checks that tags are balanced, and collects addresses and headings."""

    VOID = ("meta", "link", "img", "br", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        self.ids += [v for k, v in attrs if k == "id" and v]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_complete_and_self_contained(page: Path, runs: list[str]) -> None:
    text = page.read_text(encoding="utf-8")
    reader = Reader(text)
    assert all(address.startswith(("data:", "#")) for address in reader.addresses)
    assert not re.search(r"url\((?!#)|@import|<script", text)
    parts = ["curves", "accuracy", "confusion", "classes", "calibration", "cost", "settings"]
    parts += ["mistakes", "labels", "distance", "maps"]
    assert set(parts) < set(reader.ids)
    assert "slow &amp; low" in text and "slow & low" not in text
    assert "OPTIM.BASE_LR" in text.replace("<wbr>", "") and "exact McNemar test" in text
    assert "lost/model.pyth does not exist: the run was not tested yet." in text
    errors = [float(line["top1_err"]) for line in read_runs(runs[1:2])[0].tests.values()]
    assert f"<b>{100 - min(errors):.2f} %</b>" in text  # of the best epoch


def test_without_images_the_page_shows_the_logs(runs: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "page.html"
    opts = ["TEST.DATASET", "image_folder", "TRAIN.DATASET", "image_folder"]
    report(out_dirs=[runs[0]], out=str(out), opts=[*opts, "DATA_LOADER.ROOT", str(tmp_path)])
    text = out.read_text(encoding="utf-8")
    assert "was not tested" in capsys.readouterr().out and "was not tested" in text
    assert 'id="curves"' in text and 'id="classes"' not in text


def test_wrong_overrides_are_errors(runs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(ConfigError, match=r"Unknown config key 'TEST.SPLITT' on the command line"):
        report(out_dirs=runs[:1], out=str(out), opts=["TEST.SPLITT", "x"])
    assert not out.exists()


def test_missing_packages_are_named(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = evaluate_runs(read_runs(runs[:1]), ["DATA_LOADER.BACKEND", "device"])
    for name in ("pytorch_grad_cam", "cleanlab.filter"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "Grad-CAM needs the package grad-cam: pip install -e &#x27;.[report]&#x27;" in (
        focus.maps(subjects)
    )
    assert "cleanlab is not installed" in mistakes.suspects(subjects)


def test_mixing_weights_come_from_the_last_epoch(runs: list[str], tmp_path: Path) -> None:
    lines = [
        json_line("train_epoch", {"epoch": f"{epoch}/2", "mixture": [[1 - w, w], [w, 1 - w]]})
        for epoch, w in ((1, 0.5), (2, 0.125))
    ]
    text = "\n".join([Path(runs[0], "log.txt").read_text(), *lines, ""])
    (tmp_path / "log.txt").write_text(text)
    (run,) = read_runs([str(tmp_path)])
    cells = re.findall(r">([\d.]+)</span>", mixing.mixtures([Subject(0, run, None, "")]))
    assert cells == ["87.5", "12.5", "12.5", "87.5"]


def look(page: Path, folder: Path, width: int) -> tuple[list[int], str]:
    """Show a page in a frame, because browser windows have a least width, and measure it.

    Returns:
        (page width, frame width, number of charts, number of broken images, font size of the text;
        messages of the browser)
    """
    script = """<script>
      const root = document.documentElement;
      const broken = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
      const size = parseInt(getComputedStyle(document.querySelector("section p")).fontSize);
      const charts = document.querySelectorAll("svg").length;
      parent.postMessage([root.scrollWidth, innerWidth, charts, broken, size].join(" "), "*");
    </script></body>"""
    text = page.read_text(encoding="utf-8").replace("</body>", script)
    (folder / "copy.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(
        "<!DOCTYPE html><script>onmessage = e => document.body.dataset.found = e.data</script>"
        f'<body><iframe src="copy.html" width="{width}" height="800" style="border:0"></iframe>'
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder}/profile"]
    run = subprocess.run(
        [*command, "--dump-dom", (folder / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'data-found="([^"]*)"', run.stdout)
    assert found is not None, run.stderr
    return [int(number) for number in found[1].split()], run.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(page: Path, tmp_path: Path, width: int) -> None:
    """Only tables and wide charts scroll sideways, each in its own frame."""
    numbers, messages = look(page, tmp_path, width)
    page_width, frame_width, num_charts, num_broken, font_size = numbers
    assert page_width == frame_width == width
    assert num_charts >= 8 and num_broken == 0 and font_size >= 14
    assert "CONSOLE" not in messages


def test_pictures_show_the_colours_of_the_images(tmp_path: Path) -> None:
    values = ["DATA_LOADER.NORMALIZE", "values", "DATA_LOADER.MEAN", "[0.2,0.2,0.2]"]
    opts = [*SMALL.split(), "OUT_DIR", str(tmp_path), *values, "DATA_LOADER.STD", "[0.3,0.3,0.3]"]
    trainer.train(lg.load_config(CONFIGS / "vit_digits_base.yaml", opts))
    (subject,) = evaluate_runs(read_runs([str(tmp_path)]), [])
    assert subject.tested is not None
    images = samples.load_images(subject.tested, [3])
    (picture,) = samples.pictures(images, build_preprocessing(subject.tested.cfg))
    original = subject.tested.dataset.image(3).resize((16, 16))
    assert np.asarray(picture).mean() == pytest.approx(np.asarray(original).mean(), abs=2)
