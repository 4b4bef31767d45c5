"""Export of the published models in full size."""

from __future__ import annotations

import pytest

from benchmarks.export import MODELS, export_random
from lg.tools.export_formats import FORMATS

NOT_IN_TIMM = {"t2t-7", "t2t-14", "pvt-ti", "cvt-13", "r-56"}
DIGITS = ["TRAIN.DATASET", "digits", "TEST.DATASET", "digits", "MODEL.NUM_CLASSES", "10"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_published_models_are_exported_with_parity(name: str, form: str) -> None:
    row = export_random(name, form, DIGITS)
    assert (row is None) == (form == "timm" and name in NOT_IN_TIMM)
    assert row is None or row["num_equal"] == row["count"] == 32
