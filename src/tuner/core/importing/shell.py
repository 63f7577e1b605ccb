"""Text of shells: words with their lines, variables, and the commands of a script.

Enough of bash, cmd and PowerShell for the scripts that people keep their training commands in. Backslashes stay, so
that paths of every system survive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Word = tuple[str, str]
"""A word without its quotes, and its place, ``file:line``."""

_CONTINUED = re.compile(r"[\\^`][ \t]*\r?\n")
_JOINED = "\v\n"
_COMMENT = re.compile(r"\s*(#|rem\s|rem$|::)", re.IGNORECASE)
# Nothing is escaped after a drive: such a path may end in a backslash, before a quote or a blank.
_DRIVE = r"[A-Za-z]:\\"
_WORD = re.compile(
    rf"""{_DRIVE}[^\s"']*|(?:\\[ ](?![\s-])|[^\s"']|"{_DRIVE}[^"]*"|"(?:\\"|[^"])*"|'[^']*'|["'])+""", re.VERBOSE
)
_QUOTED = re.compile(rf""""({_DRIVE}[^"]*)"|"((?:\\"|[^"])*)"|'([^']*)'|\\([ ])""")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_SETS = ("export", "set", "declare", "local", "readonly")
_ENDS = ("&&", "||", ";", "|", "&")
_REDIRECTS = re.compile(r"(\d|&)?>>?(&\d)?")
_VARIABLE = re.compile(r"\$\{(\w+)(?:\[@\])?(?::?-([^}]*))?\}|\$(?:env:)?([A-Za-z_]\w*)|%(\w+)%")
UNFILLED = re.compile(r"\$\{?\w+\}?|\$\(|%[A-Za-z_]\w*%")


@dataclass(slots=True)
class Variable:
    """A variable that a script sets: its words, where, and whether a command uses it."""

    words: list[str]
    where: str
    used: bool = False


@dataclass(slots=True)
class Script:
    """Commands in order, with the variables that the script sets before them filled in."""

    commands: list[list[Word]] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)


def words_of(text: str, name: str) -> list[Word]:
    """All words of a text. Lines are continued by a backslash, ``^`` or a backtick; quotes group; ``#`` and ``REM``
    lines are comments."""
    return [(_plain(raw), place) for raw, place, _ in _raw_words(text, name)]


def read_script(text: str, name: str) -> Script:
    """The commands of a script. A line that begins with an option or a quote goes on with the command above it."""
    script = Script()
    command: list[Word] = []
    skip = False
    for raw, place, new_line in _raw_words(text, name):
        if new_line and not raw.startswith(("-", '"', "'")) and not _is_open(command):
            command = _finish(script, command)
            skip = False
        if skip:
            skip = False
        elif raw in _ENDS:
            command = _finish(script, command)
        elif _REDIRECTS.match(raw) and not raw.startswith("<"):
            skip = _REDIRECTS.fullmatch(raw) is not None and "&" not in raw[1:]
        elif raw.endswith(";") and len(raw) > 1:
            command = _finish(script, [*command, *_filled(script, raw[:-1], place)])
        else:
            command += _filled(script, raw, place)
    _finish(script, command)
    return script


def _raw_words(text: str, name: str) -> Iterator[tuple[str, str, bool]]:
    """Words with their quotes, their places, and whether one begins a line that continues no other."""
    lines = ["" if _COMMENT.match(line) else line for line in _CONTINUED.sub(_JOINED, text).split("\n")]
    text = "\n".join(lines)
    end, hidden = 0, -1
    for match in _WORD.finditer(text):
        if match.start() < hidden:
            continue
        if match[0].startswith("#"):
            hidden = text.find("\n", match.start())
            hidden = len(text) if hidden < 0 else hidden
            continue
        new_line = end == 0 or "\n" in text[end : match.start()].replace(_JOINED, "")
        end = match.end()
        yield match[0], f"{name}:{text.count(chr(10), 0, match.start()) + 1}", new_line


def _plain(raw: str) -> str:
    """A word without its quotes."""

    def inner(match: re.Match[str]) -> str:
        if match[2] is not None:
            return match[2].replace('\\"', '"')
        return next(part for part in (match[1], match[3], match[4]) if part is not None)

    return raw if re.match(_DRIVE, raw) else _QUOTED.sub(inner, raw)


def _filled(script: Script, raw: str, place: str) -> list[Word]:
    """A word with variables filled in; one that is a variable alone may stand for several words."""
    whole = _VARIABLE.fullmatch(raw.strip('"'))
    if whole is not None and (known := _known(script, whole)) is not None:
        array = "[@]" in raw
        if array or not raw.startswith('"'):
            return [(part, place) for word in known.words for part in ([word] if array else _split(word))]
        return [(" ".join(known.words), place)]
    if raw.startswith("'"):
        return [(_plain(raw), place)]

    def value(match: re.Match[str]) -> str:
        found = _known(script, match)
        return match[0] if found is None else " ".join(found.words)

    return [(_VARIABLE.sub(value, _plain(raw)), place)]


def _split(text: str) -> list[str]:
    return [word for word, _ in words_of(text, "")]


def _known(script: Script, match: re.Match[str]) -> Variable | None:
    name = match[1] or match[3] or match[4]
    found = script.variables.get(name)
    if found is None:
        return None if match[2] is None else Variable([match[2]], "")
    found.used = True
    return found


def _is_open(command: list[Word]) -> bool:
    """Whether a list of words in brackets is not closed yet."""
    return bool(command) and "=(" in command[0][0] and not command[-1][0].endswith(")")


def _finish(script: Script, command: list[Word]) -> list[Word]:
    """Keep a command, or the variables that it sets. Returns the next one, which is empty."""
    if command and not _assigns(script, command):
        script.commands.append(command)
    return []


def _assigns(script: Script, command: list[Word]) -> bool:
    """Take over variables when the words do nothing but set them."""
    words = [word for word, _ in command]
    place = command[0][1]
    if words[0].startswith("$") and (len(words) > 2 and words[1] == "="):
        script.variables[words[0].removeprefix("$").removeprefix("env:")] = Variable(words[2:], place)
        return True
    if words[0].lower() in _SETS:
        words = words[1:]
    if words and "=(" in words[0] and (match := _ASSIGNED.fullmatch(words[0])):
        inside = " ".join([match[2].removeprefix("("), *words[1:]]).removesuffix(")")
        listed = [match[2].removeprefix("("), *words[1:-1], words[-1].removesuffix(")")] if len(words) > 1 else [inside]
        script.variables[match[1]] = Variable([word for word in listed if word], place)
        return True
    matches = [_ASSIGNED.fullmatch(word.removeprefix("$").removeprefix("env:")) for word in words]
    if not words or not all(matches):
        return False
    for found in matches:
        assert found is not None
        script.variables[found[1]] = Variable([found[2]], place)
    return True


def leading_assignments(command: list[Word]) -> Mapping[str, str]:
    """Environment variables that are set for one command: its first words of the form ``NAME=value``, and places."""
    found = {}
    for word, place in command:
        if not _ASSIGNED.fullmatch(word):
            break
        found[word] = place
    return found
