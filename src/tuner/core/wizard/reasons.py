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
_MODEL = re.compile(r"recognised as .+")
_PRESET = re.compile(r"^// Preset (?:quick|balanced|thorough|faster): [^\r\n]*(\r?\n)", re.MULTILINE)
_LEVER = re.compile(r"[\d.]+ \w+ (less|more) than without, .*")
_NUMBER = re.compile(r"\d+|\{\w+\}")


def is_own(comment: str) -> bool:
    """Whether the wizard wrote a comment; numbers in it may be others by now."""
    known = _NUMBER.sub("#", comment) in _known()
    return known or _MODEL.fullmatch(comment) is not None or _LEVER.fullmatch(comment) is not None


def model(family: str, flavour: str) -> str:
    """For the comment above the section of the model."""
    return f"recognised as {family} {flavour}".rstrip()


def preset(name: str, cost: str) -> str:
    """A line of the head: what was chosen, and what the planner said about it."""
    return f"Preset {name}: {cost}."


def with_preset(head: str, line: str | None) -> str:
    """The text before the document with another line about the preset, or without it; as it is where it has none."""
    written = "" if line is None else one_line(f"// {line}")
    return _PRESET.sub(lambda found: written + found[1] if written else "", head, count=1)


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
