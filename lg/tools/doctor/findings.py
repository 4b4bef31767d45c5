"""Findings: what the doctor reports, and how it is printed."""

from __future__ import annotations

import contextlib
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lg.errors import first_line, is_out_of_memory

FACT, PROBLEM, NOTE = LEVELS = ("fact", "problem", "note")
TOPICS = ("Data", "Model and guide", "Device and precision", "Time and memory", "Output")
DATA, MODEL, DEVICE, COST, OUTPUT = TOPICS
_SHOWN = 10  # examples of a finding


@dataclass(frozen=True)
class Finding:
    """One thing to know before training.

    Attributes:
        level: PROBLEM: stops training or spoils its result. NOTE: may be intended. FACT.
        topic: One of TOPICS.
        text: The cause, its place and the fix; lines after the first are examples.
    """

    level: str
    topic: str
    text: str


class Findings(list[Finding]):
    """The findings so far, without duplicates.

    Attributes:
        memory_advice: Which settings need less memory; part of each out-of-memory problem.
        copies: Images in training and tested splits, as rows (see `images.LEAK_COLUMNS`).
    """

    memory_advice = ""

    def __init__(self) -> None:
        """Start without findings."""
        super().__init__()
        self.copies: list[list[str]] = []

    def add(self, *findings: Finding) -> None:
        """Append the findings that are not there yet."""
        self.extend(each for each in findings if each not in self)

    def has_problem(self, *topics: str) -> bool:
        """Return whether there is a problem, of any or of the given topics."""
        return any(f.level == PROBLEM and f.topic in (topics or TOPICS) for f in self)

    @contextlib.contextmanager
    def catch(self, topic: str, action: str, *, key: str = "") -> Iterator[None]:
        """Turn an exception within the block into a problem.

        Args:
            topic: Of the problem.
            action: What the block does, such as "loading weights".
            key: The setting that the block depends on.
        """
        try:
            yield
        except Exception as error:
            text = _describe(error, action, self.memory_advice)
            self.add(Finding(PROBLEM, topic, text if key in text else f"{key}: {text}"))


def _describe(error: Exception, action: str, memory_advice: str) -> str:
    line = first_line(error)
    if is_out_of_memory(error):
        return f"{action} runs out of memory ({line}). {memory_advice}"
    if isinstance(error, (ValueError, OSError)):  # written for the user
        return str(error).strip()
    return f"{action} fails ({type(error).__name__}: {line}); --mode train would fail too."


def with_examples(text: str, examples: Sequence[str]) -> str:
    """Add the first examples to a text, one per line, and the number of the others."""
    more = len(examples) - _SHOWN
    return "\n".join([text, *examples[:_SHOWN], *([f"and {more:,} more"] if more > 0 else [])])


def format_size(count: int) -> str:
    """Format a number of bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def format_findings(findings: Sequence[Finding]) -> list[str]:
    """Return findings as lines: by topic, in each facts, then problems, then notes."""
    lines = []
    for topic in TOPICS:
        of_topic = [finding for finding in findings if finding.topic == topic]
        lines += [topic] if of_topic else []
        for finding in sorted(of_topic, key=lambda finding: LEVELS.index(finding.level)):
            lines += _wrap(finding)
    counts = {k: sum(finding.level == k for finding in findings) for k in (PROBLEM, NOTE)}
    problems, notes = (f"{n} {k}{'' if n == 1 else 's'}" for k, n in counts.items())
    if counts[PROBLEM]:
        return [*lines, f"{problems} to fix before training, {notes}."]
    return [*lines, f"No problems, {notes}: ready to train."]


def _wrap(finding: Finding) -> list[str]:
    mark = {PROBLEM: "PROBLEM", NOTE: "note", FACT: ""}[finding.level]
    first, *examples = finding.text.split("\n")
    # Paths are never broken, so that they can be copied.
    wrapper = textwrap.TextWrapper(
        width=min(100, shutil.get_terminal_size((100, 24)).columns),
        initial_indent=f"  {mark:<7}  ",
        subsequent_indent=" " * 11,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [*wrapper.wrap(first), *(f"{'':13}{each}" for each in examples)]
