"""A configuration before it is checked: plain values, with the place each of them came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tuner.core.config.jsonc import Path
from tuner.core.errors import UsageError


class RawConfig(dict[str, Any]):
    """A merged document; all file paths in it are absolute.

    origins: the place (file and line, option) that a JSON path was written at. homes: for values that a source or set
    inherited, the JSON path they were written at.
    """

    def __init__(
        self,
        value: Mapping[str, Any] | None = None,
        origins: Mapping[Path, str] | None = None,
        homes: Mapping[Path, Path] | None = None,
    ) -> None:
        super().__init__(value or {})
        self.origins: dict[Path, str] = dict(origins or {})
        self.homes: dict[Path, Path] = dict(homes or {})

    def where(self, path: Path) -> str:
        """``config.json:12, optimizer.lr``: place and JSON path of the nearest part around or inside it."""
        for length in range(len(path), 0, -1):
            origin = self.origins.get(path[:length])
            if origin is not None:
                return f"{origin}, {dotted(path)}"
        # Something that only an option made has the place of what was put into it.
        inside = next((origin for known, origin in self.origins.items() if known[: len(path)] == path), None)
        return ", ".join(filter(None, (inside, dotted(path))))

    def overlay(self, path: Path, value: Any, origin: str) -> None:
        """Put ``value`` at ``path``, making objects on the way; refuses to go through anything that is not there."""
        target: Any = self
        for depth, (key, after) in enumerate(zip(path, (*path[1:], None), strict=True)):
            if isinstance(target, list):
                if not isinstance(key, int) or key >= len(target):
                    raise UsageError(
                        f"there is no entry {key!r} in {dotted(path[:depth])}, which has {len(target)}", where=origin
                    )
            elif not isinstance(target, dict):
                raise UsageError(f"{dotted(path[:depth])} is {target!r}, not an object", where=origin)
            elif isinstance(key, int):
                raise UsageError(f"{dotted(path[:depth]) or 'the document'} is not a list", where=origin)
            if after is None:
                target[key] = value
            elif isinstance(target, dict) and target.get(key) is None:
                target[key] = {}
            target = target[key]
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        self.origins[path] = origin


def dotted(path: Path) -> str:
    """``data.sets[0].path``; the empty path is the empty string."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def split_path(text: str) -> Path | None:
    """``a.b[0].c`` or ``a.b.0.c`` as a path; None when it is neither."""
    if not re.fullmatch(r"[^.\[\]]+(\[\d+\]|\.[^.\[\]]+)*", text):
        return None
    parts = [name or index for name, index in _PART.findall(text)]
    return tuple(int(part) if part.isdigit() else part for part in parts)


def loose_value(text: str) -> Any:
    """``text`` as JSON when it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Both objects by key; objects are merged, everything else of ``high`` replaces what is in ``low``."""
    result = dict(low)
    for key, value in high.items():
        below = result.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def value_at(document: Any, path: Path) -> Any:
    """What is at a path of a document, None for nothing."""
    for key in path:
        if isinstance(document, Mapping):
            document = document.get(key)
        elif isinstance(document, list) and isinstance(key, int) and key < len(document):
            document = document[key]
        else:
            return None
    return document


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every path below ``value`` with its value, parents first."""
    entries: Iterator[tuple[str | int, Any]] = iter(())
    if isinstance(value, Mapping):
        entries = iter(value.items())
    elif isinstance(value, list | tuple):
        entries = iter(enumerate(value))
    for key, below in entries:
        yield (*path, key), below
        yield from walk(below, (*path, key))
