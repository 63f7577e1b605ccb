"""Sets of a data section in the making: values, with the rows of the report that they come from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuner.core.config.jsonc import Path as JsonPath
from tuner.core.errors import UsageError
from tuner.core.importing.apply import Translation
from tuner.core.importing.report import Row


@dataclass(slots=True)
class Part:
    """A piece of the result, with the rows that made each of its keys (relative places)."""

    value: dict[str, Any] = field(default_factory=dict)
    owners: list[tuple[JsonPath, Row]] = field(default_factory=list)

    def put(self, key: str, value: Any, *rows: Row | None) -> None:
        target, path = self.value, tuple(key.split("."))
        for part in path[:-1]:
            target = target.setdefault(part, {})
        target[path[-1]] = value
        self.owners += [(path, row) for row in rows if row is not None]


@dataclass(slots=True)
class SetDraft:
    """One set before sets that differ only in size are joined. geometry: its keys besides size and batch."""

    size: Any
    batch: int
    size_rows: list[Row]
    batch_rows: list[Row]
    geometry: Part
    sources: list[Part]


def write_sets(into: Translation, drafts: Sequence[SetDraft]) -> None:
    """Put the sets into the configuration; sets that differ in size and batch alone become one with lists."""
    if not drafts:
        raise UsageError("no data set is left", fix="name a data set with images")
    taken: set[str] = set()
    sets = [_joined(group, ("data", "sets", number), taken) for number, group in enumerate(_alike(drafts))]
    into.config["data"] = into.config.get("data", {}) | {"sets": sets}


def _alike(drafts: Sequence[SetDraft]) -> list[list[SetDraft]]:
    """Sets with the same geometry and sources, together."""
    groups: list[list[SetDraft]] = []
    for draft in drafts:
        plain = [each.value for each in draft.sources]
        same = next((g for g in groups if g[0].geometry.value == draft.geometry.value
                     and [each.value for each in g[0].sources] == plain), None)  # fmt: skip
        if same is None:
            groups.append([draft])
        else:
            same.append(draft)
    return groups


def _joined(group: Sequence[SetDraft], place: JsonPath, taken: set[str]) -> dict[str, Any]:
    """The set at ``place`` that a group becomes; its rows are told their keys. taken: names of sources so far."""
    sizes = [each.size for each in group]
    entry: dict[str, Any] = {"resolution": sizes[0] if len(group) == 1 and isinstance(sizes[0], int) else sizes}
    for row in [row for each in group for row in each.size_rows]:
        _own(row, (*place, "resolution"))
    batches = [each.batch for each in group]
    rows = [row for each in group for row in each.batch_rows]
    if rows or any(each != 1 for each in batches):
        entry["batch_size"] = batches[0] if len(set(batches)) == 1 else batches
        for row in rows:
            _own(row, (*place, "batch_size"))
    entry |= group[0].geometry.value
    for draft in group:
        for path, row in draft.geometry.owners:
            _own(row, (*place, *path))
    entry["sources"] = []
    for index, source in enumerate(group[0].sources):
        entry["sources"].append({"id": _unique(source.value["path"], taken)} | source.value)
        for draft in group:
            for path, row in draft.sources[index].owners:
                _own(row, (*place, "sources", index, *path))
    return entry


def _own(row: Row, path: JsonPath) -> None:
    if path not in row.keys:
        row.keys.append(path)


def _unique(path: str, taken: set[str]) -> str:
    name = re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "images"
    found = next(each for each in _numbered(name) if each not in taken)
    taken.add(found)
    return found


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1
