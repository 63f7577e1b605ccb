"""``{a|b}`` choices inside captions; ``{{`` and ``}}`` stand for literal braces."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product

_CHOICE = re.compile(r"\{([^{}]+)\}")
# Characters that no caption file holds: they stand in for escaped braces while choices are replaced.
_OPEN, _CLOSE = "\ue000", "\ue001"


def _pieces(text: str) -> list[tuple[str, ...]]:
    """Literal text and choices in turn; a literal is a choice of one."""
    guarded = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    found: list[tuple[str, ...]] = []
    end = 0
    for match in _CHOICE.finditer(guarded):
        found.append((guarded[end : match.start()],))
        found.append(tuple(match.group(1).split("|")))
        end = match.end()
    found.append((guarded[end:],))
    return found


def _join(parts: Sequence[str]) -> str:
    return "".join(parts).replace(_OPEN, "{").replace(_CLOSE, "}")


def expand(text: str, pick: Callable[[int, Sequence[str]], str]) -> str:
    """Replace every choice by one of its parts. pick: (number of the choice from 0, its parts) -> part."""
    number, parts = 0, []
    for options in _pieces(text):
        if len(options) == 1:
            parts.append(options[0])
        else:
            parts.append(pick(number, options))
            number += 1
    return _join(parts)


def expansions(text: str) -> Iterator[str]:
    """Every text that ``expand`` can make, the one with all first parts first; repeats are possible."""
    for parts in product(*_pieces(text)):
        yield _join(parts)


def count_expansions(text: str) -> int:
    """How many texts ``expansions`` yields, without making them."""
    total = 1
    for options in _pieces(text):
        total *= len(options)
    return total
