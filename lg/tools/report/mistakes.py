"""The parts with pictures: the worst mistakes, and images whose labels are suspect.

N counts images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import PurePath

import numpy as np

from lg.datasets.base import ImageDataset
from lg.errors import DataError
from lg.tools.predict import Predictions
from lg.tools.report import page, results
from lg.tools.report.subject import Subject, by_images, with_tests

NUM_PICTURES = 12


def worst(subjects: Sequence[Subject]) -> str:
    """Return the wrong predictions of each run with the highest loss, as pictures."""
    html = ""
    for subject, tested in with_tests(subjects):
        order = worst_mistakes(tested.predictions)
        num_wrong = int((~results.hits(tested.predictions)).sum())
        html += f"<h3>{page.run_name(subject.number, subject.run.name)}</h3>"
        html += page.paragraph(
            f"{num_wrong:,} of {len(tested.predictions.labels):,} images are wrong."
            + (f" The {len(order)} with the highest loss:" if num_wrong > len(order) else "")
        )
        html += _gallery(tested.predictions, tested.dataset, order)
    text = "Label → predicted class with its probability; below, the probability of the label."
    return page.paragraph(text) + html if html else ""


def worst_mistakes(result: Predictions) -> np.ndarray:
    """Return the indices of wrong predictions, the highest loss first, at most NUM_PICTURES."""
    order = np.argsort(_label_probabilities(result), kind="stable")
    return order[~results.hits(result)[order]][:NUM_PICTURES]


def _label_probabilities(result: Predictions) -> np.ndarray:
    return result.probabilities[np.arange(len(result.labels)), result.labels]


def suspects(subjects: Sequence[Subject]) -> str:
    """Return test images whose labels may be wrong, judged by all runs that saw them together."""
    html = ""
    for group in by_images(subjects):
        result = _average([tested.predictions for _, tested in group])
        indices, is_ranking = suspected_labels(result)
        if len(group) > 1:
            names = ", ".join(subject.run.name for subject, _ in group)
            html += page.paragraph(f"Mean of the predictions of {names}.")
        if is_ranking:
            html += page.note(
                f"cleanlab is not installed ({page.INSTALL}), so these are simply the images whose "
                "labels the models find least probable."
            )
        elif not len(indices):
            html += page.note("cleanlab suspects no label.")
        else:
            shown = min(len(indices), NUM_PICTURES)
            rest = f", of which the {shown} least probable are shown" * (shown < len(indices))
            html += page.note(f"cleanlab suspects {len(indices):,} labels{rest}.")
        html += _gallery(result, group[0][1].dataset, indices[:NUM_PICTURES])
    text = (
        "Test images that the models, which never trained on them, confidently put into another "
        "class than their label says. Look at them: some are wrong labels, others hard images."
    )
    return page.paragraph(text) + html if html else ""


def suspected_labels(result: Predictions) -> tuple[np.ndarray, bool]:
    """Return indices of images with suspect labels, the most suspect first.

    Returns:
        (indices, whether they are only a ranking by loss, for lack of cleanlab)
    """
    try:
        from cleanlab.filter import find_label_issues  # an extra
    except ImportError:
        return worst_mistakes(result), True
    known = np.unique(result.labels)  # cleanlab wants images of every class
    probabilities = result.probabilities[:, known].astype(np.float64)
    if len(known) < 2:
        return np.zeros(0, dtype=np.int64), False
    probabilities /= np.maximum(probabilities.sum(axis=1, keepdims=True), 1e-12)
    found = find_label_issues(
        labels=np.searchsorted(known, result.labels),
        pred_probs=probabilities,
        return_indices_ranked_by="self_confidence",
        n_jobs=1,
    )
    return np.asarray(found, dtype=np.int64), False


def _average(tests: Sequence[Predictions]) -> Predictions:
    """Return the mean of the predictions for the same images."""
    first = tests[0]
    mean = np.mean([test.probabilities for test in tests], axis=0)
    return replace(first, probabilities=mean, predicted=mean.argmax(axis=1))


def _gallery(result: Predictions, dataset: ImageDataset, indices: np.ndarray) -> str:
    """Return pictures with label, prediction and place; unreadable images are left out."""
    pictures = []
    for index in indices.tolist():
        try:
            image = dataset.image(index).convert("RGB")  # browsers show no float images
        except DataError:
            continue
        row = result.probabilities[index]
        label, predicted = int(result.labels[index]), int(result.predicted[index])
        names = [result.class_names[label], "not finite"]
        if predicted >= 0:
            names[1] = result.class_names[predicted]
        place = result.images[index]
        short = "/".join(PurePath(place).parts[-2:])
        caption = (
            f"<b>{escape(names[0])}</b> → {escape(names[1])}, {100 * row[predicted]:.0f} %"
            f'<span class="path" title="{escape(place)}">label {100 * row[label]:.1f} %<br>'
            f"{escape(short)}</span>"
        )
        pictures.append(page.picture(image, caption, f"{names[0]}, predicted as {names[1]}"))
    return page.grid(pictures, "pictures") if pictures else ""
