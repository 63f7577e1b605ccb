"""The configuration as the wizard builds it: plain values by path, in the order that a reader expects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Final

from tuner.core.config.jsonc import Path
from tuner.core.config.write import in_order, one_line, written_object

GONE: Final = object()
"""The value of a key that must not be there."""


def with_values(document: Mapping[str, Any], values: Mapping[Path, Any]) -> dict[str, Any]:
    """A copy with other values at some paths; objects are made on the way, and go when they are emptied."""
    result: dict[str, Any] = json.loads(json.dumps(document))
    for path, value in values.items():
        _put(result, path, value)
    return result


def _put(target: Any, path: Path, value: Any) -> None:
    if len(path) == 1:
        if value is GONE:
            target.pop(path[0], None)
        else:
            target[path[0]] = json.loads(json.dumps(value))
        return
    key, rest = path[0], path[1:]
    if isinstance(rest[0], str) and isinstance(target, dict) and not isinstance(target.get(key), dict):
        if value is GONE:
            return
        target[key] = {}
    _put(target[key], rest, value)
    if value is GONE and target[key] == {}:
        del target[key]


def shortened(value: Any, base: FilePath) -> Any:
    """A copy in which absolute paths below ``base`` are relative to it, so that the folder can be moved."""
    if isinstance(value, Mapping):
        return {key: shortened(below, base) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(below, base) for below in value]
    if isinstance(value, str) and FilePath(value).is_absolute() and FilePath(value).is_relative_to(base):
        return FilePath(value).relative_to(base).as_posix()
    return value


def new_text(document: Mapping[str, Any], comments: Mapping[Path, str], head: tuple[str, ...]) -> str:
    """The file: comment lines, then the sections in their order."""
    return "\n".join([*(one_line(f"// {line}") for line in head), written_object(in_order(document), comments)]) + "\n"
