"""Published learning curves: which runs they apply to, and when a run is far off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lg
from lg.config.published import published_curve
from lg.logs.log import RunLog
from lg.logs.pictures import Pictures
from lg.logs.reporter import Reporter
from lg.metrics import EvalResult

CONFIG = Path(__file__).parents[2] / "configs/deit/deit-ti_c100_ours.yaml"
LOGIT = ["DISTILLATION.ENABLE_INTER", "False", "DISTILLATION.ENABLE_LOGIT", "True"]


def test_the_curve_applies_to_its_model_data_epochs_and_guidance_only() -> None:
    assert published_curve(lg.load_config(CONFIG, LOGIT))[151] == 74.1
    for other in (
        ["TRANSFORMER.DEPTH", "11"],
        ["TRAIN.FRACTION", "0.5"],
        ["OPTIM.MAX_EPOCH", "200"],
        ["DISTILLATION.ENABLE_INTER", "True"],
        ["DISTILLATION.SCHEDULE", "decay_linear"],
        ["TRAIN.PATCH_DROP", "0.5"],
        ["TEST.DATASET", "digits"],
        ["TEST.SPLIT", "train"],
    ):
        assert published_curve(lg.load_config(CONFIG, [*LOGIT, *other])) == {}
    assert published_curve(lg.load_config(CONFIG)) == {}
    assert published_curve(lg.load_config(CONFIG, [*LOGIT, "TEST.DATASET", ""]))[300] == 78.5


# The curve at epoch 63 is 57.8 + 12 / 25 * (65.0 - 57.8) = 61.256.
@pytest.mark.parametrize(
    ("tests", "warned"),
    [
        ([(25, 1.0), (26, 34.1), (63, 56.3), (300, 73.6)], None),
        ([(26, 39.0), (63, 56.2), (64, 10.0)], "Top-1 of epoch 63 is 56.2 %; published runs with"),
        ([(300, 73.4)], "Top-1 of epoch 300 is 73.4 %"),
    ],
)
def test_a_run_far_below_the_curve_is_reported_once(
    tests: list[tuple[int, float]],
    warned: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = Reporter(
        log=(log := RunLog(tmp_path)),
        pictures=Pictures(log, [], enabled=False),
        device=torch.device("cpu"),
        split="cifar100/test",
        final_split="",
        steps_per_epoch=1,
        max_epoch=300,
        batch_size=1,
        num_classes=10,
        inter=False,
        logit=True,
        published=published_curve(lg.load_config(CONFIG, LOGIT)),
    )
    for epoch, accuracy in tests:
        result = EvalResult(100 - accuracy, 0, 0, 0, 0, 1, [1], [0])
        best = {"top1_err": 0.0, "top5_err": 0.0}
        for average in (False, True):
            report.test_epoch(result, best, epoch=epoch - 1, seconds=1, batches=1, average=average)
    report.log.close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (warned is not None) and (warned is None or warned in said[0])
