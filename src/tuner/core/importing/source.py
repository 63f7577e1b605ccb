"""Reading what users of other trainers have: command lines, TOML, JSON and ``.env`` files, with lines."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.core.config.jsonc import Path as JsonPath
from tuner.core.config.jsonc import parse
from tuner.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Given:
    """One option as it was written. ``value`` is text or a list of texts from a command line, typed from a file."""

    name: str
    value: Any
    where: str
    shown: str = ""

    @property
    def label(self) -> str:
        return self.shown or self.name


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file and the place of each key, ``file:line``."""

    value: Any
    lines: dict[JsonPath, int]
    name: str

    def where(self, path: JsonPath) -> str:
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name


@dataclass(frozen=True, slots=True)
class CommandLine:
    """launcher: options before the script. script: its file name, empty when there is none. options: those after it."""

    launcher: tuple[Given, ...]
    script: Given | None
    options: tuple[Given, ...]


_CONTINUED = re.compile(r"[\\^`][ \t]*\r?\n")
_WORD = re.compile(r"""(?:[^\s"']|"(?:\\"|[^"])*"|'[^']*')+""")
_QUOTED = re.compile(r""""((?:\\"|[^"])*)"|'([^']*)'""")
_NUMBER = re.compile(r"-\d|-\.\d")


def words_of(text: str, name: str) -> list[tuple[str, str]]:
    """The words of a command line with their places. Lines are continued by a backslash, ``^`` or a backtick; quotes
    group; backslashes stay, so that paths of every system survive; ``#`` and ``REM`` lines are comments."""
    kept = [
        "" if re.match(r"\s*(#|rem\s|::)", line, re.IGNORECASE) else line
        for line in _CONTINUED.sub(" \n", text).split("\n")
    ]
    text = "\n".join(kept)
    found = []
    for match in _WORD.finditer(text):
        word = _QUOTED.sub(lambda m: (m[1] or "").replace('\\"', '"') if m[1] is not None else m[2] or "", match[0])
        found.append((word, f"{name}:{text.count(chr(10), 0, match.start()) + 1}"))
    return found


def command_line(words: Sequence[tuple[str, str]]) -> CommandLine:
    """Split the words of one command: what launches, the script, and the script's options."""
    at = next((i for i, (word, _) in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        start = next((i for i, (word, _) in enumerate(words) if word.startswith("--")), len(words))
        return CommandLine((), None, tuple(_options(words[start:])))
    word, where = words[at]
    script = Given("script", re.split(r"[\\/]", word)[-1], where, word)
    return CommandLine(tuple(_options(words[:at])), script, tuple(_options(words[at + 1 :])))


def _options(words: Sequence[tuple[str, str]]) -> list[Given]:
    found: list[Given] = []
    for word, where in words:
        if word.startswith("-") and not _NUMBER.match(word) and word != "-":
            name, equals, value = word.partition("=")
            found.append(Given(name.lstrip("-").replace("-", "_"), [value] if equals else [], where, name))
        elif found:
            last = found[-1]
            found[-1] = Given(last.name, [*last.value, word], last.where, last.shown)
    return found


def read_text(path: Path) -> str:
    """The text of a file. UsageError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError("there is no such file", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read this file", where=str(path), why=str(error)) from None


def read_document(path: Path) -> Document:
    """A TOML or JSON file."""
    text = read_text(path)
    if path.suffix.lower() == ".toml":
        try:
            return Document(tomllib.loads(text), _toml_lines(text), path.name)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"not valid TOML: {error}", where=str(path)) from None
    parsed = parse(text, str(path))
    return Document(parsed.value, parsed.lines, path.name)


_HEADER = re.compile(r"\s*(\[\[?)\s*([\w.\-\"' ]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"\s*([\w\-]+|\"[^\"]+\"|'[^']+')\s*=")


def _toml_lines(text: str) -> dict[JsonPath, int]:
    """The line of each table and of each plain key; tomllib keeps none."""
    lines: dict[JsonPath, int] = {}
    counts: dict[JsonPath, int] = {}
    table: JsonPath = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = ()
            parts = [part.strip().strip("\"'") for part in header[2].split(".")]
            for depth, part in enumerate(parts):
                table = (*table, part)
                last = depth == len(parts) - 1
                if last and header[1] == "[[":
                    counts[table] = counts.get(table, -1) + 1
                if table in counts:
                    table = (*table, counts[table])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault((*table, key[1].strip("\"'")), number)
    return lines


_ENV = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)$")


def read_env(path: Path) -> list[Given]:
    """``NAME=value`` lines of a shell file; references to other variables of the file are filled in."""
    known: dict[str, str] = {}
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        match = _ENV.match(line)
        if match is None or line.lstrip().startswith("#"):
            continue
        value = re.split(r"\s+#", match[2].strip())[0] if not match[2].strip().startswith(("'", '"')) else match[2]
        words = words_of(value, "")
        text = " ".join(word for word, _ in words)
        text = re.sub(r"\$\{?(\w+)\}?", lambda m: known.get(m[1], m[0]), text)
        known[match[1]] = text
        found.append(Given(match[1], text, f"{path.name}:{number}"))
    return found


def shown_value(value: Any) -> str:
    """A value as a report shows it."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return " ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
