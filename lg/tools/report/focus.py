"""The parts about where models look: attention distance, attention maps and Grad-CAM."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch
from PIL import Image

from lg.builders import build_preprocessing
from lg.datasets.base import evenly_spaced
from lg.tools.report import figures, page
from lg.tools.report.activation import class_activation
from lg.tools.report.attention import MIN_SIDE, BlockDistance, block_distances, image_attention
from lg.tools.report.samples import load_images, one_per_class, overlay, pictures
from lg.tools.report.subject import Subject, Tested, by_images, with_tests

_NUM_MEASURED = 32  # images whose attention is measured
_NUM_SHOWN = 6


def distances(subjects: Sequence[Subject]) -> str:
    """Return the mean attention distance of every block and head."""
    measured: list[tuple[Subject, list[BlockDistance]]] = []
    notes = ""
    for subject, tested in with_tests(subjects):
        images = load_images(tested, evenly_spaced(len(tested.dataset), _NUM_MEASURED))
        found = block_distances(tested.model, images)
        if found:
            measured.append((subject, found))
        else:
            notes += page.note(
                f"{subject.run.name} is left out: {tested.model.family} has no attention between "
                "places of the whole image."
            )
    if not measured:
        return ""
    text = (
        "Mean distance between a position of the image and the positions it attends to, weighted "
        f"by attention, over {_NUM_MEASURED} test images, in pixels of the model's input. Each dot "
        "is a head, each line the mean of a block; the dotted line is uniform attention. Imitating "
        "a CNN teaches locality: look for short distances in early blocks."
    )
    rows = []
    for subject, found in measured:
        uniform = sum(each.uniform for each in found) / len(found)
        mean = sum(each.mean for each in found) / len(found)
        nearest = min(found, key=lambda each: min(each.heads))
        rows.append(
            [
                page.run_name(subject.number, subject.run.name),
                f"{mean:.2f}",
                f"{100 * mean / uniform:.0f} %",
                f"{found[0].mean:.2f}",
                f"{found[-1].mean:.2f}",
                f"{min(nearest.heads):.2f}, block {nearest.block}",
            ]
        )
    heads = ["run", "mean, pixels", "of uniform", f"block {measured[0][1][0].block}"]
    heads += ["last block", "most local head"]
    plot = figures.distance_plot([(subject.number, found) for subject, found in measured])
    return (
        page.paragraph(text)
        + page.legend([subject.run.name for subject in subjects])
        + page.beside(page.chart(plot), page.table(heads, rows))
        + notes
    )


def maps(subjects: Sequence[Subject]) -> str:
    """Return attention maps and Grad-CAM of some test images, each run below the other."""
    html = "".join(map(_map_table, by_images(subjects)))
    text = (
        "Attention: what the class token of the last block attends to (without a class token: what "
        "all positions attend to), mean over heads. Grad-CAM: the regions that support the "
        f"predicted class, given below. Maps of at least {MIN_SIDE} x {MIN_SIDE} positions are "
        "preferred to later, coarser ones. Brighter means more; each map has its own scale."
    )
    return page.paragraph(text) + html if html else ""


def _map_table(group: Sequence[tuple[Subject, Tested]]) -> str:
    first = group[0][1]
    indices = one_per_class(first.predictions.labels, _NUM_SHOWN)
    names = [first.predictions.class_names[first.predictions.labels[k]] for k in indices]
    rows, notes = [], []
    for number, (subject, tested) in enumerate(group):
        images = load_images(tested, indices)
        shown = pictures(images, build_preprocessing(tested.cfg))
        if number == 0:
            rows.append(["image", *(page.thumbnail(image, "") for image in shown)])
        title = page.run_name(subject.number, subject.run.name)
        attention = image_attention(tested.model, images)
        if attention is None:
            notes.append(f"{subject.run.name} has no attention map ({tested.model.family}).")
        else:
            row = [f"{title}<br>attention, block {attention[0]}"]
            rows.append(row + [_overlay(*pair) for pair in zip(shown, attention[1], strict=True)])
        try:
            activation = class_activation(tested.model, images)
        except ImportError:
            notes.append(f"Grad-CAM needs the package grad-cam: {page.INSTALL}")
            continue
        if activation is not None:
            captions = [_prediction(tested, k) for k in indices]
            row = [f"{title}<br>Grad-CAM, block {activation[0]}"]
            cells = zip(shown, activation[1], captions, strict=True)
            rows.append(row + [_overlay(*cell) for cell in cells])
    table = page.table(["", *map(escape, names)], rows, kind="maps")
    return table + "".join(map(page.note, dict.fromkeys(notes)))


def _overlay(image: Image.Image, heat: torch.Tensor, caption: str = "") -> str:
    return page.thumbnail(overlay(image, heat), caption)


def _prediction(tested: Tested, index: int) -> str:
    row = tested.predictions.probabilities[index]
    return f"{tested.predictions.class_names[int(row.argmax())]}, {100 * row.max():.0f} %"
