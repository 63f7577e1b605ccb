"""``events.jsonl``: one JSON object per line, only ever appended; every view of a run is made from it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)

FREQUENT = frozenset({"step"})
"""Kinds that are handed to the system but not forced to disk; a crash of the program loses none of them."""


class EventLog:
    """Appends events. A line is written in one call, so a killed process leaves at most one torn line at the end.

    When the file cannot be written (a full disk) the run goes on: the problem is logged once, later events are tried
    again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._torn = _ends_torn(path)
        self._failed = False
        self._file = path.open("ab", buffering=0)

    def emit(self, kind: str, **fields: Any) -> None:
        """Append ``{"time": ..., "kind": kind, **fields}``. Values are JSON values, paths or tuples of them.

        Numbers that JSON has no word for become null. Every kind outside `FREQUENT` is forced to disk.
        """
        event = {"time": _now(), "kind": kind, **_plain(fields)}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"
        # A torn line from a crash stays what it is: a line of its own that readers skip.
        data = (b"\n" if self._torn else b"") + line.encode()
        try:
            self._torn = self._file.write(data) != len(data)
            if kind not in FREQUENT:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._torn = True
            if not self._failed:
                log.error("events are not recorded: %s cannot be written (%s)", self.path.name, error.strerror)
            self._failed = True

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a file in order; lines that a crash cut off are skipped. No file: no events."""
    if not path.is_file():
        return []
    events: list[dict[str, Any]] = []
    skipped = 0
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except ValueError:
                skipped += 1
                continue
            if isinstance(event, dict) and "kind" in event:
                events.append(event)
            else:
                skipped += 1
    if skipped:
        log.warning("%s: skipped %d unfinished line(s)", path.name, skipped)
    return events


def without_redone(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events as one uninterrupted run would have left them.

    A run that goes on from a checkpoint repeats the steps after it: what was recorded for those before the
    ``resume`` event is dropped, from every kind that carries a step.
    """
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] == "resume" and isinstance(event.get("step"), int):
            kept = [each for each in kept if each["kind"] == "resume" or _step(each) <= event["step"]]
        kept.append(event)
    return kept


def _step(event: Mapping[str, Any]) -> int:
    step = event.get("step")
    return step if isinstance(step, int) else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _ends_torn(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False
