"""What became of every option, and the configuration that came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from tuner.core.config.document import dotted, value_at
from tuner.core.config.jsonc import Path
from tuner.core.importing.source import shown_value

Status = Literal["mapped", "changed", "default", "missing", "not_applicable", "not_built", "refused", "unknown"]
TITLES: dict[Status, str] = {
    "mapped": "mapped",
    "changed": "mapped, means something else here",
    "default": "default of the other program, written out",
    "missing": "names a file that is not there",
    "not_applicable": "not applicable",
    "not_built": "not built",
    "refused": "value not accepted here",
    "unknown": "unknown",
}
LEFT_OUT = ("not_built", "refused", "unknown")
"""What a user would miss in the result: it makes the exit code 3."""


@dataclass(slots=True)
class Row:
    """One line of the report. ``keys`` are the places in the configuration that it set. ``option`` is the option as it
    was spelled, ``name`` as the tables call it. ``beside``: it is no option, but stands in the text around them."""

    where: str
    option: str
    value: Any
    status: Status
    keys: list[Path] = field(default_factory=list)
    note: str = ""
    written: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    beside: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "where": self.where,
            "option": self.option,
            "value": self.value,
            "status": self.status,
            "settings": self.written,
            "note": self.note,
        }

    def line(self) -> str:
        """``config.toml:3 network_dim = 8 -> network.rank = 8; note``."""
        value = "" if self.value is None or self.value == [] else f" = {shown_value(self.value)}"
        made = ", ".join(f"{key} = {shown_value(to)}" for key, to in self.written.items())
        return (
            f"{self.where}  {self.option}{value}{f' -> {made}' if made else ''}{f'; {self.note}' if self.note else ''}"
        )


@dataclass(slots=True)
class Imported:
    """The result of an import. ``open`` are problems that no option caused: what is still to be filled in."""

    tool: str
    config: dict[str, Any]
    rows: list[Row]
    open: list[str] = field(default_factory=list)

    @property
    def options(self) -> int:
        """Number of options in the source: every row but the defaults and what stands around a command."""
        return sum(row.where != "default" and not row.beside for row in self.rows)

    @property
    def counts(self) -> dict[Status, int]:
        found = Counter(row.status for row in self.rows)
        return {status: found[status] for status in TITLES if found[status]}

    @property
    def exit_code(self) -> int:
        return 3 if any(row.status in LEFT_OUT for row in self.rows) else 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "tool": self.tool,
            "options": self.options,
            "counts": self.counts,
            "rows": [row.as_dict() for row in self.rows],
            "open": self.open,
            "config": self.config,
        }


def fill_in(rows: Iterable[Row], config: dict[str, Any]) -> None:
    """Note in every row the values that its keys have in the finished configuration."""
    for row in rows:
        row.written = {dotted(path): value_at(config, path) for path in row.keys}
