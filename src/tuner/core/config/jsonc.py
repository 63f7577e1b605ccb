"""JSON with ``//`` and ``/* */`` comments and trailing commas, read with the line of every key.

The standard library's reader keeps no positions, and error messages that name a line need them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from tuner.core.errors import UsageError

Path = tuple[str | int, ...]

_SKIP = re.compile(r"(?:[ \t\r\n]+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.])")
_WORD = re.compile(r"[A-Za-z_]\w*")
_WORDS = {"true": True, "false": False, "null": None}
_MAX_DEPTH = 100


@dataclass
class Document:
    """A parsed file: the value, and the line (from 1) where each key or list entry begins.

    spans: start and end in the text of each key's (list entry's) name and value together, and of its value alone. The
    document itself is the empty path.
    """

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)
    spans: dict[Path, tuple[int, int]] = field(default_factory=dict)
    values: dict[Path, tuple[int, int]] = field(default_factory=dict)


def parse(text: str, name: str) -> Document:
    """Parse ``text``; ``name`` is the file name for messages. Raises UsageError at the first syntax error."""
    reader = _Reader(text.removeprefix("\ufeff"), name)
    return Document(reader.document(), reader.lines, reader.spans, reader.values)


class _Reader:
    def __init__(self, text: str, name: str) -> None:
        self.text, self.name, self.at = text, name, 0
        self.lines: dict[Path, int] = {}
        self.spans: dict[Path, tuple[int, int]] = {}
        self.values: dict[Path, tuple[int, int]] = {}

    def document(self) -> Any:
        value = self.value(())
        if self.peek():
            raise self.error("text after the end of the document")
        return value

    def error(self, what: str, at: int | None = None, fix: str | None = None) -> UsageError:
        position = self.at if at is None else at
        line = self.text.count("\n", 0, position) + 1
        column = position - self.text.rfind("\n", 0, position)
        return UsageError(f"not valid JSON: {what}", where=f"{self.name}, line {line}, column {column}", fix=fix)

    def peek(self) -> str:
        """Skip blanks and comments; the next character, or ``""`` at the end."""
        match = _SKIP.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        if self.text.startswith("/*", self.at):
            raise self.error("a comment that is never closed", fix="close it with */")
        return self.text[self.at : self.at + 1]

    def value(self, path: Path, begin: int | None = None) -> Any:
        """The value that comes next. begin: where its name starts, when it has one."""
        self.peek()
        start = self.at
        found = self.plain_value(path)
        self.values[path] = (start, self.at)
        self.spans[path] = (start if begin is None else begin, self.at)
        return found

    def plain_value(self, path: Path) -> Any:
        start = self.peek()
        if len(path) > _MAX_DEPTH:
            raise self.error("nested too deeply")
        if start == "{":
            return self.object(path)
        if start == "[":
            return self.array(path)
        if start == '"':
            return self.string()
        if number := _NUMBER.match(self.text, self.at):
            self.at = number.end()
            return json.loads(number.group())
        word = _WORD.match(self.text, self.at)
        if word and word.group() in _WORDS:
            self.at = word.end()
            return _WORDS[word.group()]
        if not start:
            raise self.error("the text ends where a value should be")
        found = word.group() if word else start
        fix = f"write {found.lower()}" if found.lower() in _WORDS else "put text in double quotes" if word else None
        raise self.error(f"expected a value, found {found!r}", fix=fix)

    def string(self) -> str:
        match = _STRING.match(self.text, self.at)
        if match is None:
            raise self.error("a string that is not closed on its line, or holds a raw control character")
        try:
            value = json.loads(match.group())
        except json.JSONDecodeError as error:
            fix = "write \\\\ for a backslash, or use / in paths"
            raise self.error(error.msg.lower(), self.at + error.pos, fix=fix) from None
        self.at = match.end()
        assert isinstance(value, str)
        return value

    def mark(self, path: Path) -> None:
        self.lines[path] = self.text.count("\n", 0, self.at) + 1

    def object(self, path: Path) -> dict[str, Any]:
        self.at += 1
        result: dict[str, Any] = {}
        while (start := self.peek()) != "}":
            if start != '"':
                raise self.error(f"expected a key in double quotes, found {start!r}" if start else "an unclosed object")
            begin = self.at
            key = self.string()
            if key in result:
                raise self.error(f"the key {key!r} comes twice in one object", begin, fix="keep one of them")
            self.lines[(*path, key)] = self.text.count("\n", 0, begin) + 1
            if self.peek() != ":":
                raise self.error(f"expected ':' after the key {key!r}")
            self.at += 1
            result[key] = self.value((*path, key), begin)
            self.separator("}", "object")
        self.at += 1
        return result

    def array(self, path: Path) -> list[Any]:
        self.at += 1
        result: list[Any] = []
        while (start := self.peek()) != "]":
            if not start:
                raise self.error("an unclosed list")
            self.mark((*path, len(result)))
            result.append(self.value((*path, len(result))))
            self.separator("]", "list")
        self.at += 1
        return result

    def separator(self, close: str, kind: str) -> None:
        found = self.peek()
        if found == ",":
            self.at += 1
        elif found != close:
            shown = f", found {found!r}" if found else ""
            raise self.error(f"expected ',' or '{close}' in the {kind}{shown}")
