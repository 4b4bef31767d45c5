"""The part about learned mixtures: which blocks imitate which guide stage."""

from __future__ import annotations

from collections.abc import Sequence

from lg.tools.report import page
from lg.tools.report.subject import Subject


def mixtures(subjects: Sequence[Subject]) -> str:
    """Return the last mixing weights of each run that learns them."""
    html = ""
    for subject in subjects:
        found = [line["mixture"] for line in subject.run.training.values() if line.get("mixture")]
        if found:
            html += f"<h3>{page.run_name(subject.number, subject.run.name)}</h3>"
            html += _table(found[-1], subject.number)
    text = (
        "Weights of the student's blocks in the mixture that imitates each stage of the guide, "
        "after the last epoch; a row sums to 100 %."
    )
    return page.paragraph(text) + html if html else ""


def _table(weights: Sequence[Sequence[float]], run: int) -> str:
    """Return weights [stages][blocks] as a table whose cells are shaded by weight."""
    heads = ["guide stage", *(f"block {block}" for block in range(len(weights[0])))]
    largest = max(max(row) for row in weights)
    shade = f"shade {page.run_class(run)}"
    rows = [
        [
            str(stage),
            *(
                f'<span class="{shade}" style="--share:{100 * w / largest:.0f}%">'
                f"{100 * w:.1f}</span>"
                for w in row
            ),
        ]
        for stage, row in enumerate(weights)
    ]
    return page.table(heads, rows, kind="shaded")
