"""The last step of an import: what this program refuses, or has no use for, leaves the configuration with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tuner.core.config.build import examine_config
from tuner.core.config.document import RawConfig, dotted, split_path, value_at
from tuner.core.config.jsonc import Path
from tuner.core.config.model import ModelConfigBase
from tuner.core.config.planned import unusable_keys
from tuner.core.config.run import RunConfig
from tuner.core.errors import UsageError
from tuner.core.importing.report import LEFT_OUT, Row, Status


def settle(config: dict[str, Any], rows: list[Row], schema: type[ModelConfigBase]) -> list[str]:
    """Take out of ``config`` what cannot stay, and tell its rows why. Returns problems that belong to no row."""
    for path, error in list(unusable_keys(RawConfig(json.loads(json.dumps(config))))):
        status: Status = "not_applicable" if "does not apply" in error.what else "not_built"
        _drop(config, rows, path, status, _reason(error))
    # Each round takes a key from its row, so this ends.
    while True:
        _, problems = examine_config(RawConfig(json.loads(json.dumps(config))), schema)
        if not any(_resolved(config, rows, problem) for problem in problems):
            return [_told(problem) for problem in problems]


def drop_defaults(config: dict[str, Any], rows: list[Row]) -> None:
    """Leave out values that are the defaults here as well; rows keep them as a note."""
    for row in rows:
        for path in list(row.keys):
            value = value_at(config, path)
            known, default = _schema_default(path)
            if known and default == value and type(default) is type(value):
                row.keys.remove(path)
                row.note = "; ".join(filter(None, (f"{dotted(path)} = {json.dumps(value)} is the default", row.note)))
                if not any(path in other.keys for other in rows):
                    _remove(config, rows, path)
    _without_empty(config)


def _schema_default(path: Path) -> tuple[bool, Any]:
    if path[0] == "model" or any(isinstance(part, int) for part in path):
        return False, None
    fields = RunConfig.model_fields
    section: Any = None
    for depth, part in enumerate(path):
        found = next((each for name, each in fields.items() if part in (name, each.alias)), None)
        if found is None or found.is_required():
            if found is None or depth == len(path) - 1:
                return False, None
            fields = getattr(found.annotation, "model_fields", {})
            continue
        section = found.get_default(call_default_factory=True)
        if depth < len(path) - 1:
            fields = getattr(type(section), "model_fields", {})
    return section is not None, section


def _resolved(config: dict[str, Any], rows: list[Row], problem: UsageError) -> bool:
    """Take out what the problem is about, when a row is to blame."""
    place = split_path((problem.where or "").rsplit(", ", 1)[-1])
    if place is None:
        return False
    owned = {path for row in rows for path in row.keys}
    exact = [path for path in owned if path == place]
    inside = [path for path in owned if path[: len(place)] == place]
    around = [path for path in owned if place[: len(path)] == path]
    unused = any(text in problem.what for text in ("no effect", "not used", "is not part of", "of no use"))
    for path in exact or around or (inside if unused or not _missing(problem) else []):
        _drop(config, rows, path, "not_applicable" if unused else "refused", _reason(problem))
        return True
    return False


def _missing(problem: UsageError) -> bool:
    return "is required" in problem.what


def _reason(error: UsageError) -> str:
    return f"{error.what} ({error.why})" if error.why else error.what


def _told(error: UsageError) -> str:
    return f"{error.what}: {error.fix}" if error.fix else error.what


def _drop(config: dict[str, Any], rows: list[Row], path: Path, status: Status, why: str) -> None:
    """Remove one value; rows that set nothing else get the status."""
    for row in rows:
        if any(own[: len(path)] == path or path[: len(own)] == own for own in row.keys):
            row.keys = [own for own in row.keys if own[: len(path)] != path and path[: len(own)] != own]
            whole = not row.keys
            if row.status != "default" and (whole or status in LEFT_OUT):
                row.status = status
            row.note = why if whole else "; ".join(filter(None, (row.note, f"left out: {why}")))
    _remove(config, rows, path)


def _remove(config: dict[str, Any], rows: list[Row], path: Path) -> None:
    target = value_at(config, path[:-1])
    last = path[-1]
    if isinstance(target, list) and isinstance(last, int):
        if last < len(target):
            del target[last]
            for row in rows:
                row.keys = [_shifted(own, path) for own in row.keys]
    elif isinstance(target, dict):
        target.pop(last, None)
    _prune_empty(config, path[:-1])


def _shifted(own: Path, removed: Path) -> Path:
    depth, index = len(removed) - 1, removed[-1]
    if len(own) > depth and own[:depth] == removed[:depth] and isinstance(own[depth], int) and isinstance(index, int):
        part = own[depth]
        assert isinstance(part, int)
        return (*own[:depth], part - 1, *own[depth + 1 :]) if part > index else own
    return own


def _prune_empty(config: dict[str, Any], path: Path) -> None:
    """Remove objects and lists that the last removal emptied."""
    while path:
        above = value_at(config, path[:-1])
        if value_at(config, path) not in ({}, []) or not isinstance(above, dict):
            return
        above.pop(path[-1], None)
        path = path[:-1]


def _without_empty(config: dict[str, Any]) -> None:
    for path in list(_empty(config, ())):
        _prune_empty(config, path)


def _empty(value: Any, path: Path) -> Iterator[Path]:
    if isinstance(value, dict):
        for key, below in list(value.items()):
            yield from _empty(below, (*path, key))
        if not value and path:
            yield path
