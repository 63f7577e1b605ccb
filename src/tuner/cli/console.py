"""Output: plain lines, with a little colour on a terminal that wants it."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

_RED, _YELLOW, _BOLD, _OFF = "\x1b[31m", "\x1b[33m", "\x1b[1m", "\x1b[0m"


def out(text: str) -> None:
    """A line of the result, on standard output."""
    sys.stdout.write(text + "\n")


def out_json(value: Any) -> None:
    """The result for a script. Every character has an escape in JSON, for streams that cannot write them all."""
    plain = "utf" not in (sys.stdout.encoding or "").lower()
    out(json.dumps(value, indent=2, ensure_ascii=plain, default=str))


def never_fail_to_write() -> None:
    """Characters that the encoding of a stream lacks are written as escapes instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def error(text: str) -> None:
    """Why the command failed, on standard error."""
    _labelled("error", _RED, text)


def warn(text: str) -> None:
    """Something to know, on standard error."""
    _labelled("warning", _YELLOW, text)


def heading(text: str) -> None:
    """A title above a block of lines."""
    out(f"{_BOLD}{text}{_OFF}" if colours(sys.stdout) else text)


def wrapped(text: str, indent: int = 2) -> None:
    """A paragraph, broken at the width of the terminal; nothing for an empty text."""
    if text:
        import shutil
        import textwrap

        margin = " " * indent
        width = max(shutil.get_terminal_size((120, 24)).columns, 60)
        out(textwrap.fill(text, width, initial_indent=margin, subsequent_indent=margin + "  ", break_on_hyphens=False))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns; numbers to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(header), *texts]) for column in range(len(header))]
    right = [bool(rows) and all(isinstance(row[column], int | float) for row in rows) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(cells, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    heading(line(header))
    for cells in texts:
        out(line(cells))


def colours(stream: TextIO) -> bool:
    """Whether to colour: a terminal, and no ``NO_COLOR`` (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def result_alone(wanted: bool) -> Iterator[None]:
    """Inside, progress goes to standard error when ``wanted``, so that standard output holds the result and no more."""
    if not wanted:
        yield
        return
    from rich import reconfigure

    reconfigure(stderr=True)
    try:
        yield
    finally:
        reconfigure(stderr=False)


def _labelled(label: str, colour: str, text: str) -> None:
    shown = f"{colour}{label}:{_OFF}" if colours(sys.stderr) else f"{label}:"
    sys.stderr.write(f"{shown} {text}\n")
