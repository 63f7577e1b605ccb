"""Reading what users of other trainers have: command lines, TOML, JSON and ``.env`` files, with lines."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.core.config.jsonc import Path as JsonPath
from tuner.core.config.jsonc import parse
from tuner.core.errors import UsageError
from tuner.core.importing.shell import Word, leading_assignments, read_script, words_of


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
    """launcher: options before the script. script: its file name, None when there is none. options: those after it.
    beside: what else the text holds, and what is to be said of it."""

    launcher: tuple[Given, ...]
    script: Given | None
    options: tuple[Given, ...]
    beside: tuple[tuple[Given, str], ...] = ()


_SECRET = re.compile(r"login|key|token|secret|passw|auth|bearer|://[^/]*@", re.IGNORECASE)
_NUMBER = re.compile(r"-\d|-\.\d")


def script_command(text: str, name: str, known: Callable[[str], bool]) -> CommandLine:
    """The one training command of a shell script. ``known`` tells the scripts that can be imported by file name.

    UsageError when there are several of them.
    """
    script = read_script(text, name)
    having = [each for each in script.commands if any(word.endswith(".py") for word, _ in each)]
    wanted = [each for each in having if any(known(_file_name(word)) for word, _ in each)]
    if len(wanted) > 1:
        raise UsageError(
            "two command lines cannot be one run",
            where=wanted[1][0][1],
            why=f"the first begins at {wanted[0][0][1]}",
            fix="import one at a time",
        )
    optioned = [each for each in script.commands if any(word.startswith("--") for word, _ in each)]
    chosen = next(iter(wanted or having[-1:] or optioned or script.commands), [])
    beside = [
        (Given(name, " ".join(each.words), each.where), "filled in" if each.used else "no option holds it")
        for name, each in script.variables.items()
    ]
    assigned = leading_assignments(chosen)
    for word, where in assigned.items():
        name, _, value = word.partition("=")
        beside.append((Given(name, value, where), "set for that command alone; set it for tuner where it matters"))
    beside += [(Given(_without_key(each), None, each[0][1]), "another command of the script")
               for each in script.commands if each is not chosen]  # fmt: skip
    line = command_line(chosen[len(assigned) :])
    return CommandLine(line.launcher, line.script, line.options, tuple(beside))


def _without_key(command: Sequence[Word]) -> str:
    """A command as text, without what may be a key or follow one."""
    words = [word for word, _ in command]
    telling = next((number for number, word in enumerate(words) if _SECRET.search(word)), len(words))
    kept = words[: telling + 1] if words[telling : telling + 1] == ["login"] else words[:telling]
    return " ".join([*kept, *(["***"] if len(kept) < len(words) else [])])


def _file_name(word: str) -> str:
    return re.split(r"[\\/]", word)[-1]


def command_line(words: Sequence[Word]) -> CommandLine:
    """Split the words of one command: what launches, the script, and the script's options."""
    at = next((i for i, (word, _) in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        start = next((i for i, (word, _) in enumerate(words) if word.startswith("--")), len(words))
        return CommandLine((), None, tuple(_options(words[start:])))
    word, where = words[at]
    script = Given("script", _file_name(word), where, word)
    return CommandLine(tuple(_options(words[:at])), script, tuple(_options(words[at + 1 :])))


def _options(words: Sequence[Word]) -> list[Given]:
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


def located(name: str, home: Path, base: Path) -> Path | None:
    """A file that a source names: where that program would look, else beside the source."""
    found = (Path(base, name), Path(home, name), home / _file_name(name))
    return next((each for each in found if each.is_file()), None)


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


_ENV = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)(\+?)=(.*)$")
_REFERENCE = re.compile(r"\$\{?(\w+)\}?")


def read_env(path: Path) -> tuple[list[Given], set[str]]:
    """``NAME=value`` and ``NAME+=value`` lines of a shell file, and the names that other lines refer to.

    References to other variables of the file are filled in.
    """
    known: dict[str, str] = {}
    found = []
    used: set[str] = set()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        match = _ENV.match(line)
        if match is None or line.lstrip().startswith("#"):
            continue
        text = " ".join(word for word, _ in words_of(match[3], ""))
        used |= {name for name in _REFERENCE.findall(text) if name in known and name != match[1]}
        text = _REFERENCE.sub(lambda m: known.get(m[1], m[0]), text)
        known[match[1]] = f"{known.get(match[1], '')} {text}".strip() if match[2] else text
        found.append(Given(match[1], text, f"{path.name}:{number}"))
    return found, used


def shown_value(value: Any) -> str:
    """A value as a report shows it."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return " ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
