"""Changing values of a configuration file and nothing else: comments, order and layout of the rest stay."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.core.config.jsonc import Document, Path, parse
from tuner.core.config.write import one_line, written_value

_TAIL = re.compile(r"(?:[ \t]+|//[^\r\n]*|/\*.*?\*/)*", re.DOTALL)
"""Blanks and comments up to the end of a line."""
_BETWEEN = re.compile(r"(?:[ \t\r\n]+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
"""Blanks and comments, over lines."""


@dataclass(frozen=True, slots=True)
class _Change:
    """put: the value at ``path`` becomes ``value``, a new key or entry when there is none. drop: it goes."""

    path: Path
    value: Any = None
    drop: bool = False


def edited_text(
    text: str,
    value: Mapping[str, Any],
    name: str,
    comments: Mapping[Path, str] | None = None,
    *,
    is_own: Callable[[str], bool] | None = None,
) -> str:
    """``text`` with the least changes that make it read as ``value``.

    Keys that are new come last in their object, under the comment that ``comments`` has for them. What is dropped
    leaves its comments behind. is_own: tells comments that the caller wrote itself, without the slashes; one above a
    key gives way to what ``comments`` has for it, and goes when the value changed without one.

    UsageError when ``text``, called ``name`` in messages, is not valid.
    """
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text.removeprefix(mark)
    while True:
        document = parse(text, name)
        change = _first_change(document.value, value, ())
        if change is None:
            return mark + (text if is_own is None else _refreshed(text, name, comments or {}, is_own))
        owner = _owner(text, document, change.path)
        above = None if owner is None or is_own is None else _comment_above(text, document.spans[owner][0], is_own)
        text = _applied(text, document, change, comments or {})
        if above is not None and (owner not in (comments or {}) or (change.drop and owner == change.path)):
            text = text[: above[0]] + text[above[1] :]


def unified_diff(before: str, after: str, name: str) -> str:
    """What an edit changes, as ``diff -u`` shows it; empty when nothing does."""
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"{name} (now)", f"{name} (new)"
    )
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def _first_change(old: Any, new: Any, path: Path) -> _Change | None:
    """The next difference to remove; parts that are in both are entered before anything is added or dropped."""
    if isinstance(old, dict) and isinstance(new, Mapping):
        for key in old:
            if key not in new:
                return _Change((*path, key), drop=True)
            if (found := _first_change(old[key], new[key], (*path, key))) is not None:
                return found
        return next((_Change((*path, key), new[key]) for key in new if key not in old), None)
    if isinstance(old, list) and isinstance(new, list | tuple):
        for index, (before, after) in enumerate(zip(old, new, strict=False)):
            if (found := _first_change(before, after, (*path, index))) is not None:
                return found
        if len(old) > len(new):
            return _Change((*path, len(old) - 1), drop=True)
        return _Change((*path, len(old)), new[len(old)]) if len(new) > len(old) else None
    return None if type(old) is type(new) and old == new else _Change(path, new)


def keys_under(text: str, name: str, is_own: Callable[[str], bool]) -> list[Path]:
    """The keys on whose line above stands a comment that ``is_own`` knows. UsageError when ``text`` is not valid."""
    text = text.removeprefix("\ufeff")
    document = parse(text, name)
    own = [path for path in document.spans if path and _owner(text, document, path) == path]
    return [path for path in own if _comment_above(text, document.spans[path][0], is_own) is not None]


def _owner(text: str, document: Document, path: Path) -> Path | None:
    """What the line begins with that ``path`` is on, itself or something around it: a comment above is about that."""
    if path not in document.spans:
        return None
    line = text.rfind("\n", 0, document.spans[path][0]) + 1
    for length in range(len(path), 0, -1):
        start = document.spans[path[:length]][0]
        if start >= line and not text[line:start].strip():
            return path[:length]
    return None


def _comment_above(text: str, at: int, is_own: Callable[[str], bool]) -> tuple[int, int] | None:
    """Start and end of the line above, when it is a comment of the caller's own."""
    line = text.rfind("\n", 0, at) + 1
    start = text.rfind("\n", 0, line - 1) + 1 if line else 0
    found = text[start:line].strip()
    return (start, line) if line and found.startswith("//") and is_own(found.removeprefix("//").strip()) else None


def _refreshed(text: str, name: str, comments: Mapping[Path, str], is_own: Callable[[str], bool]) -> str:
    """The text with the caller's comments above keys as they are now."""
    for path, comment in comments.items():
        span = parse(text, name).spans.get(path)
        above = None if span is None else _comment_above(text, span[0], is_own)
        if above is not None:
            start, end = above
            text = text[:start] + _indent(text, start) + one_line(f"// {comment}") + _newline(text) + text[end:]
    return text


def _applied(text: str, document: Document, change: _Change, comments: Mapping[Path, str]) -> str:
    if change.drop:
        return _without(text, document, change.path)
    if change.path in document.values:
        start, end = document.values[change.path]
        shown = written_value(
            _plain(change.value), pad=_indent(text, start), unit=_unit(text, document), path=change.path
        )
        return text[:start] + _lines(shown, text) + text[end:]
    return _with(text, document, change, comments)


def _with(text: str, document: Document, change: _Change, comments: Mapping[Path, str]) -> str:
    """A new key at the end of its object, or a new entry at the end of its list."""
    parent = change.path[:-1]
    start, end = document.values[parent]
    unit, newline = _unit(text, document), _newline(text)
    children = _children(document, parent)
    spread = "\n" in text[start:end] or not parent
    pad = _indent(text, start) + unit
    if children and spread:
        pad = _indent(text, document.spans[children[-1]][0])
    key = change.path[-1]
    label = f"{json.dumps(key, ensure_ascii=False)}: " if isinstance(key, str) else ""
    if not spread:
        entry = label + json.dumps(_plain(change.value), ensure_ascii=False)
        if not children:
            return text[: end - 1].rstrip() + entry + text[end - 1 :]
        at = document.spans[children[-1]][1]
        return f"{text[:at]}, {entry}{text[at:]}"
    entry = pad + label + _lines(
        written_value(_plain(change.value), pad=pad, unit=unit, path=change.path, comments=comments), text
    )  # fmt: skip
    if change.path in comments:
        entry = pad + one_line(f"// {comments[change.path]}") + newline + entry
    if children:
        last = document.spans[children[-1]][1]
        comma = _comma(text, last)
        tail = _end(_TAIL, text, last if comma is None else comma + 1)
        added = newline + entry if text[tail : tail + 1] in ("\r", "\n") else newline + entry + newline
        if comma is None:
            return text[:last] + "," + text[last:tail] + added + text[tail:]
        return text[:tail] + added + text[tail:]
    close = end - 1
    head = text[:close].rstrip(" \t")
    gap = "" if head.endswith("\n") else newline
    return head + gap + entry + newline + _indent(text, start) + text[close:]


def _without(text: str, document: Document, path: Path) -> str:
    """The text without one key or entry; a line that is blank then goes too."""
    start, end = document.spans[path]
    comma = _comma(text, end)
    if comma is not None:
        # The comma may stand behind a comment, which stays.
        text = text[:comma] + text[comma + 1 :]
    else:
        before = [each for each in _children(document, path[:-1]) if document.spans[each][1] <= start]
        previous = _comma(text, document.spans[before[-1]][1]) if before else None
        if previous is not None:
            text = text[:previous] + text[previous + 1 :]
            start, end = start - 1, end - 1
    line = text.rfind("\n", 0, start) + 1
    stop = text.find("\n", end)
    stop = len(text) if stop < 0 else stop + 1
    if not text[line:start].strip() and not text[end:stop].strip():
        return text[:line] + text[stop:]
    return text[:start] + text[end:].lstrip(" ")


def _children(document: Document, parent: Path) -> list[Path]:
    depth = len(parent) + 1
    return [path for path in sorted(document.spans, key=lambda each: document.spans[each][0])
            if len(path) == depth and path[:-1] == parent]  # fmt: skip


def _comma(text: str, at: int) -> int | None:
    """Where the comma after ``at`` stands, None when there is none before the next name, value or bracket."""
    found = _end(_BETWEEN, text, at)
    return found if text[found : found + 1] == "," else None


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None
    return match.end()


def _indent(text: str, at: int) -> str:
    """The blanks that the line of ``at`` begins with."""
    line = text[text.rfind("\n", 0, at) + 1 :]
    return line[: len(line) - len(line.lstrip(" \t"))]


def _unit(text: str, document: Document) -> str:
    """What one level of the file is indented by."""
    first = next((span[0] for path, span in document.spans.items() if len(path) == 1), None)
    return (_indent(text, first) if first is not None else "") or "  "


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _lines(shown: str, text: str) -> str:
    return shown.replace("\n", _newline(text))


def _plain(value: Any) -> Any:
    """Tuples as lists, as they are read."""
    return json.loads(json.dumps(value))
