"""A configuration as text: JSON with a comment where a reader would ask why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tuner.core.config.jsonc import Path

_WIDTH = 100
_ORDER = (
    "model", "data", "network", "optimizer", "schedule", "train", "precision", "memory", "quantize", "checkpoint",
    "sample", "validate",
)  # fmt: skip


def in_order(document: Mapping[str, Any]) -> dict[str, Any]:
    """The sections in the order that a reader expects; others follow as they come."""
    known = [key for key in _ORDER if key in document]
    return {key: document[key] for key in [*known, *(key for key in document if key not in known)]}


def written_object(value: Mapping[str, Any], comments: Mapping[Path, str] | None = None) -> str:
    """The document without a newline at its end. comments: put on a line above the key at that path."""
    return _object(value, (), comments or {}, "")


def written_value(
    value: Any, *, pad: str = "", unit: str = "  ", path: Path = (), comments: Mapping[Path, str] | None = None
) -> str:
    """One value that starts on a line indented by ``pad``; further lines are indented by ``unit`` below that."""
    return _value(value, path, comments or {}, pad, unit)


def one_line(text: str) -> str:
    """A comment must not run over its line."""
    return " ".join(text.split())


def _value(value: Any, path: Path, comments: Mapping[Path, str], pad: str, unit: str = "  ") -> str:
    plain = json.dumps(value, ensure_ascii=False)
    noted = any(place[: len(path)] == path and len(place) > len(path) for place in comments)
    if not noted and len(plain) + len(pad) <= _WIDTH and (not isinstance(value, dict) or len(path) > 1):
        return plain
    if isinstance(value, dict) and value:
        return _object(value, path, comments, pad, unit)
    if isinstance(value, list) and value:
        inner = pad + unit
        entries = [f"{inner}{_value(each, (*path, i), comments, inner, unit)}" for i, each in enumerate(value)]
        return "[\n" + ",\n".join(entries) + f"\n{pad}]"
    return plain


def _object(value: Mapping[str, Any], path: Path, comments: Mapping[Path, str], pad: str, unit: str = "  ") -> str:
    inner = pad + unit
    parts = []
    for key, below in value.items():
        place = (*path, key)
        note = f"{inner}{one_line('// ' + comments[place])}\n" if place in comments else ""
        parts.append(f"{note}{inner}{json.dumps(key)}: {_value(below, place, comments, inner, unit)}")
    return "{\n" + ",\n".join(parts) + f"\n{pad}}}"
