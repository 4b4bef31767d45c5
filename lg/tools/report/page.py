"""The parts that a page is made of; each function returns HTML.

Arguments named `html` are HTML already. All other texts come from users and are escaped here.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lg.logs.plots import COLORS

MISSING = "&ndash;"  # shown in place of a missing value
INSTALL = "pip install -e '.[report]'"  # the optional packages
_STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
_SMALL = 64  # pixels; smaller images are shown with sharp pixels
_LARGE = 224  # pixels; larger images are reduced


class Section(NamedTuple):
    """A part of the page with a heading.

    Attributes:
        key: Anchor.
        title: Heading.
        html: Content; a section without content is left out.
    """

    key: str
    title: str
    html: str


def page(title: str, subtitle: str, top_html: str, sections: Iterable[Section]) -> str:
    """Return the whole document."""
    shown = [section for section in sections if section.html]
    links = "".join(f'<a href="#{each.key}">{escape(each.title)}</a>' for each in shown)
    body = "".join(
        f'<section id="{each.key}"><h2>{escape(each.title)}</h2>{each.html}</section>'
        for each in shown
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="lead">{escape(subtitle)}</p></header>
<main>{top_html}<nav aria-label="Sections">{links}</nav>{body}</main>
</body>
</html>
"""


def paragraph(text: str) -> str:
    """Return a paragraph of explanation."""
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    """Return a remark about something that is missing or must be kept in mind."""
    return f'<p class="note">{escape(text)}</p>'


def run_class(number: int) -> str:
    """Return the CSS class of a run (counted from 0), which sets its colour."""
    return f"r{number % len(COLORS)}"


def run_name(number: int, name: str) -> str:
    """Return a run's name behind a dot in its colour."""
    text = escape(name)
    return f'<span class="run" title="{text}"><i class="dot {run_class(number)}"></i>{text}</span>'


def key(name: str) -> str:
    """Return the name of a setting, which may break after its points and underscores."""
    return re.sub(r"([._])", r"\1<wbr>", escape(name))


def legend(names: Sequence[str]) -> str:
    """Return the names of the runs in their colours; nothing for a single run."""
    if len(names) < 2:
        return ""
    return f'<p class="legend">{"".join(run_name(k, name) for k, name in enumerate(names))}</p>'


def grid(items_html: Iterable[str], kind: str = "charts") -> str:
    """Return items side by side, as many as there is room for."""
    return f'<div class="{kind}">{"".join(items_html)}</div>'


def beside(chart_html: str, table_html: str) -> str:
    """Return a chart with a table beside it, or below it where there is no room."""
    return f'<div class="beside">{chart_html}{table_html}</div>'


def chart(svg_html: str, caption_html: str = "", *, wide: bool = False) -> str:
    """Return a chart in a frame; a wide one scrolls on narrow screens."""
    caption = f"<figcaption>{caption_html}</figcaption>" if caption_html else ""
    kind = "chart wide" if wide else "chart"
    return f'<figure class="{kind}">{caption}<div class="scroll">{svg_html}</div></figure>'


def table(heads_html: Sequence[str], rows_html: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """Return a table that scrolls in its own frame; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads_html)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows_html
    )
    return (
        f'<div class="scroll table {kind}" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(title: str, html: str) -> str:
    """Return content that opens on demand."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def picture(image: Image.Image, caption_html: str, label: str) -> str:
    """Return an image inside the page, with a caption.

    Args:
        image: RGB.
        caption_html: Below the image.
        label: What a screen reader says.
    """
    kind = ' class="pixels"' if max(image.size) < _SMALL else ""
    return (
        f'<figure class="picture"><img{kind} src="{data_uri(image)}" alt="{escape(label)}">'
        f"<figcaption>{caption_html}</figcaption></figure>"
    )


def thumbnail(image: Image.Image, caption: str) -> str:
    """Return a small image for a cell of a table, with a text below it."""
    text = f"<span>{escape(caption)}</span>" if caption else ""
    return f'<img src="{data_uri(image)}" alt="{escape(caption)}">{text}'


def data_uri(image: Image.Image) -> str:
    """Return an image as the text of a URI; a large one is reduced and compressed."""
    stream = io.BytesIO()
    if max(image.size) < _SMALL:
        image.save(stream, "png")
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((_LARGE, _LARGE))
        image.save(stream, "jpeg", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
