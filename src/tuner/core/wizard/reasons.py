"""Why a key has its value: the comments that the wizard writes, and knows again when it changes what they explain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from tuner.core.config.write import one_line
from tuner.core.wizard.goals import AS_PRESET, GOALS, PACES, settings_of

EDGE = "area of the pictures, as the edge of a square"
BUCKETS = "finer steps than usual, for small pictures"
SAMPLE_SIZE = "as in training, which is smaller than usual"
PROMPTS = "drawn at each of these steps, and by the base model to compare"
FOLDER = "the run's folder: report, samples, and the file for your programs"
HELD_OUT = "a tenth is held out: the report tells whether new pictures gain too"
PLANNED = "chosen by the planner"
SKIPPED = "files that cannot be read are left out: {count} now"
FALLBACK = "fallback describes the {count} pictures without a caption"
UNCAPTIONED = "{count} pictures without a caption are left out"
PREFIX = "prefix puts the word before every caption: {lacking} of {count} lack it"
FEWER_BITS = "faster here, with slightly different results"
_LEVER = re.compile(r"[\d.]+ \w+ (less|more) than without, .*")
_NUMBER = re.compile(r"\d+|\{\w+\}")


def is_own(comment: str) -> bool:
    """Whether the wizard wrote a comment; numbers in it may be others by now."""
    return _NUMBER.sub("#", comment) in _known() or _LEVER.fullmatch(comment) is not None


@cache
def _known() -> frozenset[str]:
    return frozenset(_NUMBER.sub("#", one_line(each)) for each in _every())


def _every() -> Iterator[str]:
    yield from (EDGE, BUCKETS, SAMPLE_SIZE, PROMPTS, FOLDER, HELD_OUT, PLANNED)
    yield from (SKIPPED, FALLBACK, UNCAPTIONED, PREFIX, AS_PRESET, FEWER_BITS)
    for goal in GOALS:
        for pace in PACES:
            for cpu in (False, True):
                yield from settings_of(goal, pace, 1, {}, cpu=cpu).comments.values()
