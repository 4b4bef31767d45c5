"""A run of the report with what its best weights predict for the test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from yacs.config import CfgNode

from lg import trainer
from lg.config import load_trained_config
from lg.datasets.base import ImageDataset
from lg.distributed import World
from lg.errors import ConfigError, UserError
from lg.metrics import EvalResult
from lg.models.backbone import Backbone, unwrap
from lg.tools.predict import Predictions, evaluate_loaded
from lg.tools.report.results import same_images
from lg.tools.report.runs import RunRecord


@dataclass(frozen=True)
class Tested:
    """The best weights of a run and what they predict.

    Attributes:
        cfg: With TEST.WEIGHTS.
        model: In evaluation mode on `device`.
        device: Of the test.
        dataset: The images.
        predictions: For each of them.
        result: Of the test.
    """

    cfg: CfgNode
    model: Backbone
    device: torch.device
    dataset: ImageDataset
    predictions: Predictions
    result: EvalResult


@dataclass(frozen=True)
class Subject:
    """A run of the report.

    Attributes:
        number: Counted from 0; sets its colour.
        run: What its log says.
        tested: Its test; None if there are no weights or images.
        problem: Why there is no test; empty if there is one.
    """

    number: int
    run: RunRecord
    tested: Tested | None
    problem: str


def test_runs(runs: Sequence[RunRecord], opts: Sequence[str]) -> list[Subject]:
    """Test the best weights of each run; a run that cannot be tested gets a `problem`.

    Args:
        runs: The runs.
        opts: Overrides for all of them, KEY VALUE KEY VALUE ...

    Raises:
        ConfigError: A config cannot be used with the overrides.
    """
    subjects = []
    for number, run in enumerate(runs):
        tested, problem = None, ""
        if not run.weights.is_file():
            problem = f"{run.weights} does not exist: the run was not tested yet."
        else:
            try:
                tested = _test(run, opts)
            except (UserError, OSError) as error:
                if opts and isinstance(error, ConfigError):  # the overrides may be wrong
                    raise
                problem = str(error)
        subjects.append(Subject(number, run, tested, problem))
    return subjects


def _test(run: RunRecord, opts: Sequence[str]) -> Tested:
    # A report downloads nothing unless it is told to.
    own = ["TEST.WEIGHTS", str(run.weights), "DATA_LOADER.DOWNLOAD", "False"]
    if run.final:  # not the images that chose the weights
        own += ["TEST.SPLIT", run.final["split"].rpartition("/")[2]]
    cfg = load_trained_config(run.weights, [*own, *opts])
    cfg, model, dataset, precision = trainer.load_tested(cfg, World())
    predictions, result = evaluate_loaded(cfg, model, dataset, precision)
    return Tested(cfg, unwrap(model), precision.device, dataset, predictions, result)


def with_tests(subjects: Sequence[Subject]) -> list[tuple[Subject, Tested]]:
    """Return the runs that were tested, with their tests."""
    return [(subject, subject.tested) for subject in subjects if subject.tested is not None]


def by_images(subjects: Sequence[Subject]) -> list[list[tuple[Subject, Tested]]]:
    """Return the tested runs in groups that were tested on the same images."""
    groups: list[list[tuple[Subject, Tested]]] = []
    for subject, tested in with_tests(subjects):
        for group in groups:
            if same_images(group[0][1].predictions, tested.predictions):
                group.append((subject, tested))
                break
        else:
            groups.append([(subject, tested)])
    return groups
