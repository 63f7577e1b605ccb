"""Several runs side by side: what they came to, and which settings and versions differ between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from tuner.core.atomic import write_text
from tuner.core.errors import UsageError
from tuner.core.track.charts import Line, line_chart, smoothed
from tuner.core.track.page import details, flattened, page, picture, section, table
from tuner.core.track.progress import byte_size, duration
from tuner.core.track.record import RunRecord, read_run
from tuner.core.track.report import points_of

OWN = ("checkpoint.dir", "checkpoint.name")
"""Settings that differ between any two runs."""
MAX_SHEETS = 8
SHOWN = 40
"""Characters of a reason that are shown in a table."""
COLUMNS: Mapping[str, str] = {
    "run": "run", "state": "ended", "steps": "steps", "seconds": "time", "loss": "training loss", "delta": "held-out",
    "interval": "95% interval", "best": "best held-out", "speed": "images/s", "memory": "device memory",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One run in numbers; None for what it did not record.

    loss: average of the last epoch. delta, low, high: held-out loss against the base model at the last validation, with
    its 95% interval; best, best_step: the lowest. speed: images per second. memory: bytes on the device.
    """

    run: str
    folder: Path
    state: str
    steps: int
    seconds: float
    loss: float | None
    delta: float | None
    low: float | None
    high: float | None
    best: float | None
    best_step: int | None
    speed: float | None
    memory: int | None

    def cells(self) -> dict[str, str]:
        """The columns as text."""
        interval = "" if self.low is None or self.high is None else f"{self.low:+.4f} to {self.high:+.4f}"
        return {
            "run": self.run,
            "state": self.state if len(self.state) <= SHOWN else f"{self.state[: SHOWN - 3]}...",
            "steps": f"{self.steps:,}",
            "seconds": duration(self.seconds),
            "loss": _number(self.loss, ".4f"),
            "delta": _number(self.delta, "+.4f"),
            "interval": interval,
            "best": "" if self.best is None else f"{self.best:+.4f} at {self.best_step}",
            "speed": _number(self.speed, ".2f"),
            "memory": "" if self.memory is None else byte_size(self.memory),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """rows: the runs in the given order. settings, versions: name to one value per run, where they are not all equal;
    None where a run has none."""

    rows: tuple[RunRow, ...]
    settings: Mapping[str, tuple[Any, ...]]
    versions: Mapping[str, tuple[Any, ...]]
    records: tuple[RunRecord, ...]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column titles, rows of text), without columns that no run fills."""
        cells = [row.cells() for row in self.rows]
        used = [key for key in COLUMNS if any(row[key] for row in cells)]
        return [COLUMNS[key] for key in used], [[row[key] for key in used] for row in cells]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "runs": [asdict(row) | {"folder": str(row.folder)} for row in self.rows],
            "settings": {key: list(values) for key, values in self.settings.items()},
            "versions": {key: list(values) for key, values in self.versions.items()},
        }


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read the runs. UsageError for a folder that holds none."""
    records = []
    for folder in folders:
        if not (folder / "events.jsonl").is_file():
            raise UsageError("this is not a run folder", where=str(folder), why="it holds no events.jsonl")
        records.append(read_run(folder))
    names = _names(records)
    return Comparison(
        rows=tuple(_row(record, name) for record, name in zip(records, names, strict=True)),
        settings=_different([record.config for record in records], leave_out=OWN),
        versions=_different([record.manifest or record.last("run_start").get("versions") or {} for record in records]),
        records=tuple(records),
    )


def write_comparison(comparison: Comparison, path: Path) -> None:
    """One HTML page that needs no other file and runs no script. Raises UsageError when ``path`` exists."""
    if path.exists():
        raise UsageError("this file exists", where=str(path), fix="choose another name")
    names = [row.run for row in comparison.rows]
    columns, rows = comparison.table()
    body = "".join(
        (
            f"<h1>{len(names)} runs</h1>",
            table(columns, rows),
            section("Settings that differ", table(["setting", *names], _listed(comparison.settings))),
            section("Training", _charts(comparison)),
            section("Last samples", _samples(comparison)),
            section("Versions that differ", table(["", *names], _listed(comparison.versions))),
        )
    )
    write_text(path, page(f"{', '.join(names)} - compared", body))


def _row(record: RunRecord, name: str) -> RunRow:
    steps = record.of("step")
    measured = [event for event in record.of("validation") if event.get("delta") is not None]
    last: Mapping[str, Any] = measured[-1] if measured else {}
    best: Mapping[str, Any] = min(measured, key=lambda event: event["delta"], default={})
    return RunRow(
        run=name,
        folder=record.folder,
        state=record.state(),
        steps=record.steps,
        seconds=record.seconds,
        loss=steps[-1].get("loss_avg") if steps else None,
        delta=last.get("delta"),
        low=last.get("low"),
        high=last.get("high"),
        best=best.get("delta"),
        best_step=best.get("step"),
        speed=record.speed,
        memory=record.memory,
    )


def _names(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run; the folder's where several runs call themselves the same, and a number where that is too."""
    own = [record.name for record in records]
    folders = [record.folder.resolve().name for record in records]
    names = [folder if own.count(name) > 1 else name for name, folder in zip(own, folders, strict=True)]
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]


def _different(documents: Sequence[Mapping[str, Any]], leave_out: Sequence[str] = ()) -> dict[str, tuple[Any, ...]]:
    """Leaves that are not the same in all documents."""
    leaves = [dict(flattened(document)) for document in documents]
    keys = dict.fromkeys(key for each in leaves for key in each)
    values = {key: tuple(each.get(key) for each in leaves) for key in keys if key not in leave_out}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def _listed(values: Mapping[str, tuple[Any, ...]]) -> list[list[Any]]:
    return [[key, *row] for key, row in values.items()]


def _charts(comparison: Comparison) -> str:
    charts = [
        _chart(comparison, "Loss, smoothed", "step", "loss", smooth=True),
        _chart(comparison, "Held-out loss against the base (below 0 is better)", "validation", "delta", zero=True),
        _chart(comparison, "Images per second, smoothed", "step", "images_per_second", smooth=True, zero=True),
        _chart(comparison, "Gradient norm before clipping, smoothed", "step", "grad_norm", smooth=True, zero=True),
    ]
    shown = "".join(charts)
    return f'<div class="charts">{shown}</div>' if shown else ""


def _chart(
    comparison: Comparison, title: str, kind: str, key: str, *, smooth: bool = False, zero: bool = False
) -> str:  # fmt: skip
    """One line per run."""
    lines = []
    for number, (row, record) in enumerate(zip(comparison.rows, comparison.records, strict=True)):
        points = points_of(record.of(kind), key)
        shown = smoothed(points, max(10, len(points) // 25)) if smooth else points
        style = "strong" if number < 8 else "dashed"
        lines.append(Line(name=row.run, points=shown, colour=number, style=style, dots=not smooth))
    return line_chart(title, lines, zero=zero)


def _samples(comparison: Comparison) -> str:
    parts: list[str] = []
    for row, record in zip(comparison.rows, comparison.records, strict=True):
        event = record.last("sample")
        sheet = record.inside(event.get("sheet"))
        if sheet is not None and len(parts) < MAX_SHEETS:
            title = f"{row.run}, step {event['step']}"
            parts.append(f'<p class="soft">{escape(title)}</p>{picture(sheet, title)}')
    return details("Contact sheets", "".join(parts))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
