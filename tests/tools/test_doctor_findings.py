"""Findings of the doctor: images, time, memory, disk; and how they are printed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lg
from lg.checkpoint import CheckpointFolder
from lg.datasets.scan import ImageFacts
from lg.tools.doctor import images as image_findings
from lg.tools.doctor import trial
from lg.tools.doctor.findings import (
    COST,
    DATA,
    FACT,
    NOTE,
    PROBLEM,
    Finding,
    format_findings,
    with_examples,
)
from lg.tools.doctor.images import Split
from lg.tools.doctor.recipe import check_recipe
from lg.tools.doctor.trial import Trial
from tests.run_cases import CONFIGS

ALIKE = b"alike"


def split(digests: list[bytes], labels: list[int], *, role: str = "training", **more: Any) -> Split:
    """Return images of 32 x 24 pixels, named by position."""
    images = [ImageFacts("", 32, 24, digest, "RGB") for digest in digests]
    places = [f"{role}-{position}" for position in range(len(images))]
    names = ["cat", "dog", "elk"]
    return Split(role, f"set/{role}", names, np.array(labels), places, images, **more)


def test_copies() -> None:
    train = split([b"a", ALIKE, b"b", ALIKE, b"c", ALIKE], [0, 0, 1, 0, 2, 1], is_own=True)
    assert image_findings.find_copies(train) == [
        Finding(
            PROBLEM,
            DATA,
            "1 training image identical to an image of another class, so one label is wrong. "
            "Remove or relabel them:\ntraining-1 and training-5 ('cat' and 'dog')",
        ),
        Finding(
            NOTE,
            DATA,
            "1 training image identical to another image of its class, which then counts more than "
            "once. Remove the copies unless they are intended:\ntraining-1 and training-3",
        ),
    ]
    test = split([b"x", ALIKE, b"c", b"y"], [0, 1, 2, 2], role="test", is_own=True)
    (across,) = image_findings.find_leaks(train, test)
    assert across == Finding(
        PROBLEM,
        DATA,
        "2 of the 4 test images are identical to training images, so the test error is too low. "
        "Remove them from one of the two, or write the list with --copies FILE and train with "
        "TRAIN.EXCLUDE FILE:\n"
        "test-1 and training-1\ntest-2 and training-4",
    )
    named = [dataclasses.replace(each, names=each.places) for each in (train, test)]
    assert image_findings.list_leaks(*named) == [
        ["training-1", "cat", "test-1", "test", "dog"],
        ["training-3", "cat", "test-1", "test", "dog"],
        ["training-4", "elk", "test-2", "test", "elk"],
        ["training-5", "dog", "test-1", "test", "dog"],
    ]
    published = split([ALIKE] * 6, [0] * 6, role="test")
    assert image_findings.find_leaks(train, published)[0].level == NOTE
    (note,) = image_findings.find_copies(published)
    assert note.level == NOTE and "this published set is kept as it is:" in note.text
    assert image_findings.find_leaks(train, split([b"p", b"q"], [0, 1], role="test")) == []


def test_classes_of_unequal_sizes() -> None:
    equal = split([b"a", b"b", b"c"], [0, 1, 1])
    (note,) = image_findings.find_imbalance(equal, balance="none")  # elk has none: another finding
    assert (note.level, note.text) == (
        NOTE,
        "class 'dog' has 2.0 times as many training images as class 'cat' (2 and 1): a model may "
        "neglect small classes. Set TRAIN.BALANCE weights or sampling, and compare balanced "
        "accuracy.",
    )
    assert image_findings.find_imbalance(equal, balance="weights") == []
    nearly = split([b"a"] * 5, [0, 0, 1, 1, 1])
    assert image_findings.find_imbalance(nearly, balance="none") == []


def test_unreadable_images_are_no_copies() -> None:
    images = [ImageFacts("a: empty"), ImageFacts("b: empty"), ImageFacts("", 32, 24, b"c")]
    broken = Split("training", "s/train", ["k"], np.zeros(3, int), ["a", "b", "c"], images)
    assert (
        image_findings.find_copies(broken) == [] and image_findings.find_leaks(broken, broken) != []
    )
    assert image_findings.find_leaks(broken, broken)[0].text.startswith("1 of the 3 training im")


def test_classes_of_one_split_only() -> None:
    both = split([b"a", b"b", b"c"], [0, 1, 2])
    assert image_findings.find_class_gaps(both, both) == []
    train = split([b"a", b"b"], [0, 0])
    test = split([b"c", b"d", b"e"], [1, 1, 1], role="test")
    assert [(f.level, f.text) for f in image_findings.find_class_gaps(train, test)] == [
        (
            PROBLEM,
            "class 'dog' of set/training has no training images, but 3 in set/test, which no model "
            "can get right: add training images, or remove the class from both.",
        ),
        (NOTE, "class 'elk' of set/training has no images."),
        (
            NOTE,
            "class 'cat' has training images but no test images, so the test error does not cover "
            "it.",
        ),
    ]


def test_a_class_that_loses_all_images() -> None:
    images = [ImageFacts("a: empty"), ImageFacts("", 20, 20, b"b"), ImageFacts("c: empty")]
    broken = Split("test", "s/test", ["k", "l"], np.array([0, 0, 1]), ["a", "b", "c"], images)
    first, lost = image_findings.find_unreadable(broken, skip=True)
    assert first.text.splitlines() == [
        "2 of the 3 test images cannot be read and are skipped (DATA_LOADER.ON_ERROR skip):",
        "a: empty",
        "c: empty",
    ]
    assert (first.level, lost.level) == (NOTE, PROBLEM)
    assert lost.text == "no test image of class 'l' can be read: repair some, or remove the class."
    assert image_findings.find_unreadable(broken, skip=False)[0].level == PROBLEM


def test_odd_images() -> None:
    images = [
        ImageFacts("", 15, 40, b"a", "RGB"),
        ImageFacts("", 30_000, 40, b"b", "RGB"),
        ImageFacts("", 9_000, 6_000, b"c", "P"),
        ImageFacts("", 16, 160, b"d", "P"),
    ]
    odd = Split("test", "s/test", ["k"], np.zeros(4, int), list("abcd"), images)
    assert [finding.text for finding in image_findings.find_oddities(odd)] == [
        "1 test image less than 16 pixels wide or high (a, 15 x 40)",
        "1 test image over 10 times as long as wide, squeezed or cut to a square (b, 30000 x 40)",
        "2 test images in color mode P, converted to RGB (the first is c, 9000 x 6000)",
        "1 test image of more than 50 megapixels, slow to read: shrink them (c, 9000 x 6000)",
    ]
    no_files = [ImageFacts("", 8, 8, b"e")]
    within = Split("test", "s/test", ["k"], np.zeros(1, int), ["e"], no_files)
    assert image_findings.find_oddities(within) == []
    same = Split("test", "s/test", ["k"], np.zeros(1, int), ["c"], images[2:3])
    text = "s/test: 1 test image in 1 class of 1, 9000 x 6000 pixels"
    assert image_findings.summarize(same) == Finding(FACT, DATA, text)
    sizes = "s/test: 4 test images in 1 class of 4, 15 x 40 to 9000 x 6000 pixels"
    assert image_findings.summarize(odd).text == sizes


def test_examples_are_limited() -> None:
    lines = with_examples("those:", list("abcdefghijkl")).splitlines()
    assert lines == ["those:", *"abcdefghij", "and 2 more"]
    assert with_examples("those:", ["a"]).splitlines() == ["those:", "a"]


def test_time_and_memory_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    taken = Trial([2.0, 1.5], 0.5, 0.25, 900, 4000, 1_500_000, core_wait=0.19)
    opts = "NUM_GPUS 2 TRAIN.BATCH_SIZE 64 TEST.BATCH_SIZE 100 OPTIM.MAX_EPOCH 10 TEST.PERIOD 3"
    cfg = lg.load_config(CONFIGS / "digits/vit_digits_base.yaml", opts.split())
    run: Any = SimpleNamespace(
        average=object(), device=torch.device("cpu"), loader="images are read"
    )
    found = trial.estimate_cost(cfg, taken, run, num_train=90 * 64 + 3, num_test=1999)
    # 900 steps of 0.5 s; 4 tests, the weights and their average, of 20 batches of 0.25 s.
    assert [finding.text for finding in found] == [
        "about 0.5 s per step of 32 images: 7m 30s for the 900 steps of 10 epochs, 40s for the "
        "tests, 8m 10s in total. Measured in one of 2 processes, without the exchange of "
        "gradients.",
        "peak memory: 900 of 4,000 MB (cpu).",
        "DATA_LOADER.BACKEND auto: images are read.",
    ]
    contended = dataclasses.replace(taken, core_wait=0.21)
    (note,) = trial.estimate_cost(cfg, contended, run, num_train=64, num_test=100)[3:]
    assert note.level == NOTE and note.text.startswith(
        "the steps waited 21% of the time for a core, so they ran at about 79% of their speed ("
    )
    assert "may be used; the load average is " in note.text and "OMP_NUM_THREADS=1" in note.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ({}, None),
        ({2: 0.5}, None),
        ({2: 0.5, 1: 0.36}, None),
        (
            {2: 0.5, 1: 0.05},
            "a step takes 0.05 s with 1 thread, and 0.5 s with 2 as now: set the environment "
            "variable OMP_NUM_THREADS=1.",
        ),
        (
            {1: 0.5, 8: 0.1},
            "a step takes 0.1 s with 8 threads, and 0.5 s with 1 as now: set the environment "
            "variable OMP_NUM_THREADS=8.",
        ),
    ],
)
def test_the_number_of_threads_that_helps(
    seconds: dict[int, float], text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_CLEARLY", 0.7)
    assert trial._better_threads(seconds) == text


def test_other_numbers_of_threads_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    current, tried = torch.get_num_threads(), []

    def train(run: Any) -> tuple[list[float], list[float]]:
        tried.append(torch.get_num_threads())
        return [], [0.3, 0.2]

    monkeypatch.setattr(trial, "_train", train)
    monkeypatch.setattr(trial, "usable_cores", lambda: current + 2)
    module = object()
    run: Any = SimpleNamespace(module=module, guided=module)
    others = {1, current + 2} - {current}
    assert trial._try_threads(run, 0.4) == {current: 0.4, **dict.fromkeys(others, 0.2)}
    assert set(tried) == others and torch.get_num_threads() == current
    run.module = object()  # compiled
    assert trial._try_threads(run, 0.4) == {current: 0.4}


def test_checkpoints_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opts = ["OUT_DIR", str(tmp_path), "TRAIN.KEEP_CHECKPOINTS", "2"]
    cfg = lg.load_config(CONFIGS / "digits/vit_digits_base.yaml", opts)
    folder = CheckpointFolder(tmp_path, keep=2)
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=7_900_000))
    tight = trial.estimate_disk(cfg, 2_000_000, folder)
    assert (tight.level, tight.text) == (
        PROBLEM,
        "a checkpoint takes 2.0 MB, 4 of them (kept, best and being written) 8.0 MB; 7.9 MB are "
        f"free in {tmp_path}: free some space, lower TRAIN.KEEP_CHECKPOINTS, or set OUT_DIR to "
        "another disk.",
    )
    folder.best.write_bytes(bytes(100_000))
    assert trial.estimate_disk(cfg, 2_000_000, folder).level == FACT


def test_lines_are_wrapped_and_paths_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    path = "/a/very-long-folder/with-a-name-that-goes/on-and-on/and-does-not-fit/in-60/columns.jpg"
    findings = [
        Finding(NOTE, COST, "a note"),
        Finding(NOTE, DATA, f"something is odd about this image and it is long ({path})"),
        Finding(PROBLEM, DATA, f"a problem\n{path}: empty"),
        Finding(FACT, DATA, "a fact"),
    ]
    assert format_findings(findings) == [
        "Data",
        "           a fact",
        "  PROBLEM  a problem",
        f"             {path}: empty",
        "  note     something is odd about this image and it is long",
        f"           ({path})",
        "Time and memory",
        "  note     a note",
        "1 problem to fix before training, 2 notes.",
    ]
    assert format_findings([]) == ["No problems, 0 notes: ready to train."]


def test_short_trainings_are_noted() -> None:
    def notes(**changes: Any) -> list[str]:
        settings = {"strong": True, "max_epoch": 300, "batch_size": 100, "num_train": 2040}
        return [each.text for each in check_recipe(**{**settings, **changes})]

    assert notes() == [] and notes(strong=False, max_epoch=15) == []
    (text,) = notes(max_epoch=15)
    assert text.startswith("15 epochs are short for strong augmentation")
    (text,) = notes(strong=False, max_epoch=5)
    assert "only 100 optimiser steps (5 epochs of 20): raise OPTIM.MAX_EPOCH to 10 or" in text
    assert notes(num_train=50, max_epoch=100) == []  # a batch larger than the set is a problem
