"""How a family's parameter names translate to the names its weights are published under.

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
    """How the names of one family of models translate.

    Attributes:
        renames: Pairs (our pattern, published pattern). The first that fits a name replaces its
            beginning; a name that none fits is the same on both sides.
        order: Groups of published patterns, for networks that register their parts in another
            order than the published state dict. Keys go group by group; inside a group by the
            numbers, then by pattern, then in our order. Empty: our order.
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
    """Compile a pattern: it ends where a part of the dotted name ends."""
    parts = [re.escape(part) for part in text.split("{}")]
    return re.compile(r"(\d+)".join(parts) + r"(?![^.])")


def _filled(text: str, numbers: tuple[str, ...]) -> str:
    """Return a published pattern with the numbers put in, shifted where it says so."""
    left = iter(numbers)
    return _NUMBER.sub(lambda place: str(int(next(left)) + int(place[1] or 0)), text)
