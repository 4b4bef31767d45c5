"""docs/extending.md: its examples, applied to a copy of the source, train."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/extending.md"


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page in one language."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def apply(diff: str, folder: Path) -> None:
    """Apply a diff without line numbers; its old lines must occur exactly once."""
    name, _, lines = diff.removeprefix("--- ").partition("\n")
    marked = [(line[0], line[1:]) for line in lines.removesuffix("\n").split("\n")]
    old = "\n".join(text for mark, text in marked if mark in " -")
    new = "\n".join(text for mark, text in marked if mark in " +")
    source = (folder / name).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{name}: the page shows lines that the file lacks:\n{old}"
    (folder / name).write_text(source.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source with the examples of the page."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("lg", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "run_net.py", folder)
    files = [*blocks("python"), *blocks("yaml")]
    assert len(files) == 4
    for text in files:
        first, _, body = text.partition("\n")
        path = folder / first.removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(body, encoding="utf-8")
    assert len(blocks("diff")) == 9
    for diff in blocks("diff"):
        apply(diff, folder)
    return folder


def test_a_new_model_imitates_with_a_new_loss_on_a_new_data_set(extended: Path) -> None:
    random = np.random.default_rng(0)
    labels = np.arange(90, dtype=np.uint8).reshape(-1, 1) % 9
    pixels = random.integers(0, 256, (90, 28, 28), dtype=np.uint8)
    arrays = {
        f"{split}_{kind}": array
        for split in ("train", "val", "test")
        for kind, array in (("images", pixels), ("labels", labels))
    }
    np.savez(extended / "medmnist.npz", **arrays)
    for name in ("medmnist_guide", "pool_mixer"):
        command = f"run_net.py --mode train --cfg configs/medmnist/{name}.yaml DEVICE cpu"
        opts = "DATA_LOADER.ROOT . CNN.DEPTH 8 OPTIM.MAX_EPOCH 1 OPTIM.WARMUP_EPOCHS 0"
        opts += " TRAIN.BATCH_SIZE 45 LOG_PICTURES False"
        words = [sys.executable, *command.split(), *opts.split()]
        run = subprocess.run(words, cwd=extended, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "Top-1 of 90 images" in run.stdout
