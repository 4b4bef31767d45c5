"""Fill in what the pages take from the source when the site is built."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from typing import Any

from lg.tools.keys import describe_keys


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker of docs/config.md by the tables of all keys (an event of mkdocs)."""
    return markdown.replace("<!-- keys -->", key_tables())


def key_tables() -> str:
    """Return one Markdown table per section of the config, in the order of its defaults."""
    sections: dict[str, list[str]] = defaultdict(list)
    for key, (default, meaning) in describe_keys().items():
        section = key.rpartition(".")[0] or "General"
        value = "" if default is None else f"`{default!r}`"
        text = re.sub(r"([|*_<])", r"\\\1", meaning)
        row = f'| <span id="{html.escape(key)}">`{key}`</span> | {value} | {text} |'
        sections[section].append(row)
    head = "| key | default | meaning |\n|---|---|---|\n"
    return "\n\n".join(
        f"## {section}\n\n{head}" + "\n".join(rows) for section, rows in sections.items()
    )
