"""Results of tests in words."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lg.metrics import EvalResult


def describe(result: EvalResult) -> str:
    """Return a result in words; top-5 only where there are more than 5 classes."""
    top5 = f", top-5 {100 - result.top5_err:.2f} %" if len(result.class_counts) > 5 else ""
    return (
        f"top-1 {100 - result.top1_err:.2f} %{top5} of {result.count:,} images; "
        f"{_other_rates(result.rates)}"
    )


def _other_rates(rates: Mapping[str, float]) -> str:
    return (
        f"balanced accuracy {rates['balanced_acc']:.2f} %, macro-F1 {rates['macro_f1']:.2f} %, "
        f"expected calibration error {rates['calibration_err']:.2f} %"
    )


def result_lines(
    result: EvalResult, *, split: str, class_names: list[str] | None = None
) -> list[str]:
    """Format the result of a test; with class names, also the accuracy of each class."""
    lines = [f"{split}: {describe(result)}"]
    if class_names:
        width = max(map(len, class_names))
        for name, count, accuracy in zip(
            class_names, result.class_counts, result.class_top1_acc, strict=True
        ):
            shown = "no images" if math.isnan(accuracy) else f"{accuracy:6.2f} % of {count:,}"
            lines.append(f"  {name:<{width}}  {shown}")
    return lines


def describe_protocol(final: Mapping[str, float], split: str, final_split: str) -> str:
    """Say which split chose the best epoch, and what the test set was used for.

    Args:
        final: The rates of the final test; empty if there was none.
        split: The one tested during training.
        final_split: The one of the final test.
    """
    if final:
        return (
            f"The best epoch was chosen on {split}, and its weights were tested once on "
            f"{final_split}: top-1 {100 - final['top1_err']:.2f} % of {final['count']:,} "
            f"images, {_other_rates(final)}."
        )
    name = split.rpartition("/")[2]
    if name in ("held-out", "val"):
        which = "the held-out images" if name == "held-out" else split
        return (
            f"The best epoch was chosen on {which}, and there is no test set: this result is "
            "final, and its best accuracy is optimistic."
        )
    which = "training images" if name == "train" else "test set"
    return f"The best epoch was chosen on the {which}, so its accuracy is optimistic."
