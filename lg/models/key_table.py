"""Key tables: the published names of a family's parameters.

A pattern is the beginning of a dotted name; `{}` stands for a number, and on the published side
`{+1}` or `{-1}` for that number shifted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

_NUMBER = re.compile(r"\{([+-]\d+)?\}")


@dataclass(frozen=True)
class KeyTable:
    """The translation between the parameter names of a family and their published names.

    Attributes:
        renames: Pairs (own pattern, published pattern). The first that matches a name replaces the
            beginning of the name. Names that match none are the same on both sides.
        order: Groups of published patterns, if the published state dict has another order than the
            network. Keys are sorted by group, then by their numbers, then by pattern, then by own
            order. Empty for the own order.
    """

    renames: tuple[tuple[str, str], ...] = ()
    order: tuple[tuple[str, ...], ...] = ()

    def published(self, name: str) -> str:
        """Return the published name of `name`."""
        for ours, theirs in self.renames:
            match = _pattern(ours).match(name)
            if match:
                return _filled(theirs, match.groups()) + name[match.end() :]
        return name

    def rank(self, published: str) -> tuple[int, tuple[int, ...], int]:
        """Return the sort key of a published name."""
        for section, patterns in enumerate(self.order):
            for position, pattern in enumerate(patterns):
                match = _pattern(pattern).match(published)
                if match:
                    return section, tuple(map(int, match.groups())), position
        assert not self.order, f"no pattern of the table orders {published}"
        return 0, (), 0


@cache
def _pattern(text: str) -> re.Pattern[str]:
    """Compile a pattern; it matches whole parts of a dotted name."""
    parts = [re.escape(part) for part in text.split("{}")]
    return re.compile(r"(\d+)".join(parts) + r"(?![^.])")


def _filled(text: str, numbers: tuple[str, ...]) -> str:
    """Return a published pattern with its placeholders replaced by the (shifted) numbers."""
    left = iter(numbers)
    return _NUMBER.sub(lambda place: str(int(next(left)) + int(place[1] or 0)), text)
