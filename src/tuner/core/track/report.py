"""``report.html``: one file that shows what a run did, made from what the run left behind and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tuner.core.atomic import write_text
from tuner.core.track.charts import Band, Line, line_chart, smoothed
from tuner.core.track.page import details, flattened, hide_folders, page, picture, section, table, tiles
from tuner.core.track.progress import byte_size, duration
from tuner.core.track.record import RunRecord, read_run

NAME = "report.html"
MAX_SHEETS = 8
"""Contact sheets that are embedded: the last one and others spread evenly over the run."""
MAX_ROWS = 2000
"""Images listed in the data table; the rest is in data.json."""

Event = Mapping[str, Any]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path; works at any time, also for an unfinished run.

    Reads events.jsonl, data.json, config.resolved.json, manifest.json and the contact sheets; a part whose file is
    missing is left out. The page needs no other file, runs no script, and names no folder outside the run.
    """
    record = read_run(run_dir)
    body = "".join(
        (
            _heading(record),
            section("Training", _charts(record)),
            section("Held-out images", _validation(record, "validation")),
            section("Held-out images, averaged weights", _validation(record, "validation_ema")),
            section("Samples", _samples(record)),
            section("Data", _data(record)),
            section("What happened", _timeline(record)),
            section("Settings", details("Every setting of the run", _settings(record.config))),
            section("Versions", _settings(record.manifest or record.last("run_start").get("versions", {}))),
        )
    )
    path = run_dir / NAME
    write_text(path, page(f"{record.name} - run report", body))
    return path


# --- parts ------------------------------------------------------------------------------------------------------------


def _heading(record: RunRecord) -> str:
    steps = record.of("step")
    planned = (record.last("run_start").get("plan") or {}).get("total_steps")
    entries = [("steps", f"{record.steps:,}", f"of {planned:,} planned" if planned else "")]
    if steps:
        entries.append(("time in training steps", duration(record.seconds), f"{len(steps)} steps recorded"))
        entries += _numbers(record, steps[-1])
    delta = record.last("validation")
    if delta:
        note = f"95% interval {_signed(delta.get('low'))} to {_signed(delta.get('high'))}"
        count = _images_of(delta)
        note += f", {count} image{'' if count == 1 else 's'}" if count else ""
        entries.append(("held-out loss against the base", _signed(delta.get("delta")), note))
    compared = {event["state"]: event for event in record.of("plan")}.get("compared", {})
    for key, words in (("device_bytes", "device memory"), ("step_seconds", "time of a step")):
        if compared.get(f"{key}_error") is not None:
            entries.append((f"{words} against the plan", f"{compared[f'{key}_error']:+.0%}", "tuner plan"))
    exports = [event for event in record.of("export") if event.get("weights") != "ema"]
    for export in exports[-1:]:
        keys, matched = export.get("keys"), export.get("matched")
        counted = f"{keys} keys" if matched is None else f"{matched} of {keys} keys match"
        note = ", ".join(each for each in (counted if keys else "", str(export.get("format") or "")) if each)
        entries.append(("adapter file", Path(str(export.get("path"))).name, note))
    started = record.events[0].get("time", "") if record.events else ""
    resumed = len(record.of("resume"))
    again = f" · resumed {resumed} time{'s' if resumed > 1 else ''}" if resumed else ""
    line = f"{escape(str(started))} · {escape(record.state())}{again}"
    return f'<h1>{escape(record.name)}</h1><p class="soft">{line}</p>{tiles(entries)}'


def _numbers(record: RunRecord, last: Event) -> list[tuple[str, str, str]]:
    entries = []
    if last.get("loss_avg") is not None:
        entries.append(("training loss", f"{last['loss_avg']:.4f}", "average of the last epoch"))
    if record.speed is not None:
        entries.append(("speed", f"{record.speed:.2f} images/s", "median over the steps"))
    if record.memory is not None:
        entries.append(("memory", byte_size(record.memory), "peak on the device"))
    return entries


def _charts(record: RunRecord) -> str:
    steps = record.of("step")
    rates: dict[str, list[tuple[float, float]]] = {}
    for event in steps:
        for group, rate in (event.get("lr") or {}).items():
            rates.setdefault(group, []).append((event["step"], rate))
    charts = [
        _noisy_chart("Loss", steps, "loss", 0),
        _parted_chart("Loss by timestep, smoothed", steps, "by_timestep"),
        _parted_chart("Loss by source, smoothed", steps, "by_source"),
        line_chart("Learning rate", _rate_lines(rates), zero=True),
        _noisy_chart("Gradient norm before clipping", steps, "grad_norm", 3, zero=True),
        _noisy_chart("Images per second", steps, "images_per_second", 5, zero=True),
    ]
    shown = "".join(charts)
    return f'<div class="charts">{shown}</div>' if shown else ""


def _noisy_chart(title: str, steps: Sequence[Event], key: str, colour: int, *, zero: bool = False) -> str:
    """A quantity of every step, faint, under its moving average."""
    points = points_of(steps, key)
    window = max(10, len(points) // 25)
    lines = [
        Line(name="each step", points=points, style="faint", colour=colour),
        Line(name=f"smoothed over about {window} steps", points=smoothed(points, window), colour=colour),
    ]
    return line_chart(title, lines, zero=zero, clip=0.01)


def _parted_chart(title: str, steps: Sequence[Event], key: str) -> str:
    """Moving averages of what the steps say by name under ``key``; nothing where there is one name."""
    parts: dict[str, list[tuple[float, float]]] = {}
    for event in steps:
        for name, value in (event.get(key) or {}).items():
            parts.setdefault(name, []).append((event["step"], value))
    lines = [
        Line(name=name, points=smoothed(points, max(10, len(points) // 25)), colour=colour)
        for colour, (name, points) in enumerate(sorted(parts.items()))
    ]
    return line_chart(title, lines) if len(lines) > 1 else ""


def _rate_lines(rates: Mapping[str, list[tuple[float, float]]]) -> list[Line]:
    """One line per distinct curve: groups that share a rate share a line."""
    curves: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for group, points in rates.items():
        curves.setdefault(tuple(points), []).append(group)
    return [
        Line(name=", ".join(groups[:3]) + (f" and {len(groups) - 3} more" if len(groups) > 3 else ""), points=points,
             colour=index)
        for index, (points, groups) in enumerate(curves.items())
    ]  # fmt: skip


def _validation(record: RunRecord, kind: str) -> str:
    events = [event for event in record.of(kind) if event.get("delta") is not None]
    if not events:
        return ""
    last = events[-1]
    low, high = last.get("low"), last.get("high")
    if low is None or high is None:
        verdict = ""
    elif _images_of(last) == 1:
        verdict = "<p>One held-out image says nothing about others: hold out more for an interval.</p>"
    elif high < 0:
        verdict = '<p class="good">The adapter predicts held-out images better than the base model.</p>'
    elif low > 0:
        verdict = '<p class="bad">The adapter predicts held-out images worse than the base model.</p>'
    else:
        verdict = "<p>The interval contains 0: a difference on held-out images is not shown.</p>"
    interval = [(event["step"], event["low"], event["high"]) for event in events
                if event.get("low") is not None and event.get("high") is not None]  # fmt: skip
    shuffled = points_of(events, "shuffled_delta")
    over_time = line_chart(
        "Loss with the adapter minus loss without, same noise (below 0 is better)",
        [
            Line(name="difference", points=points_of(events, "delta"), dots=True),
            Line(name="with another image's caption", points=shuffled, colour=1, style="dashed"),
        ],
        bands=[Band(name="95% interval", points=interval)],
        zero=True,
    )
    by_sigma = [(each["sigma"], each["delta"]) for each in last.get("by_sigma") or []]
    by_level = line_chart(
        "The same by noise level, last measurement", [Line(name="difference", points=by_sigma, dots=True, colour=2)],
        x_label="sigma", zero=True,
    )  # fmt: skip
    rows = [[event["step"], event.get("base"), event.get("adapted"), event["delta"], event.get("low"),
             event.get("high"), event.get("shuffled_delta")] for event in events]  # fmt: skip
    columns = ["step", "base", "adapted", "difference", "low", "high", "other caption"]
    numbers = details("Numbers", table(columns, rows, scroll=True))
    sources = [[each["source"], each["images"], each["delta"], each["low"], each["high"]]
               for each in last.get("by_source") or []]  # fmt: skip
    by_source = table(["source", "images", "difference", "low", "high"], sources) if sources else ""
    return f'{verdict}{by_source}<div class="charts">{over_time}{by_level}</div>{numbers}'


def _samples(record: RunRecord) -> str:
    found = []
    for event in record.of("sample"):
        sheet = record.inside(event.get("sheet"))
        if sheet is not None:
            found.append((event["step"], sheet))
    if not found:
        return ""
    *earlier, (step, sheet) = found
    last = picture(sheet, f"Contact sheet at step {step}")
    count = min(len(earlier), MAX_SHEETS - 1)
    chosen = [earlier[round(index * (len(earlier) - 1) / max(1, count - 1))] for index in range(count)]
    older = "".join(
        details(f"Step {step}", picture(sheet, f"Contact sheet at step {step}")) for step, sheet in reversed(chosen)
    )
    return f'<p class="soft">Step {step}</p>{last}{older}'


def _data(record: RunRecord) -> str:
    plan, ledger = record.last("run_start").get("plan") or {}, record.ledger
    parts = []
    for key, title in (("sources", "Sources"), ("buckets", "Buckets")):
        entries: list[Event] = plan.get(key) or []
        if entries:
            columns = list(entries[0])
            cells = table(
                [name.replace("_", " ") for name in columns], [[e.get(name) for name in columns] for e in entries]
            )
            parts.append(f"<p><b>{title}</b></p>{cells}")
    parts.append(_images(ledger.get("images") or []))
    left = ledger.get("left_out") or []
    if left:
        rows = [[row.get("source"), row.get("image"), row.get("reason")] for row in left[:MAX_ROWS]]
        parts.append(details(f"{len(left):,} images left out", table(["source", "image", "reason"], rows, scroll=True)))
    return "".join(parts)


def _images(images: Sequence[Event]) -> str:
    if not images:
        return ""
    rows = [[row.get("source"), row.get("image"), row.get("part"), row.get("used"), _size(row.get("size")),
             _size(row.get("bucket")), row.get("cropped_percent")] for row in images[:MAX_ROWS]]  # fmt: skip
    columns = ["source", "image", "part", "used", "size", "bucket", "cropped %"]
    more = f'<p class="soft">{len(images) - MAX_ROWS:,} more are in data.json.</p>' if len(images) > MAX_ROWS else ""
    return details(f"{len(images):,} images", table(columns, rows, scroll=True) + more)


def _timeline(record: RunRecord) -> str:
    rows = [[event["time"], event["kind"], _told(event)] for event in record.events if event["kind"] != "step"]
    return details(f"{len(rows)} events", table(["time", "event", ""], rows, scroll=True)) if rows else ""


def _told(event: Event) -> str:
    """The fields of an event in a line, without nested ones."""
    fields = [(key, value) for key, value in event.items() if key not in ("time", "kind", "images")]
    plain = [(key, value) for key, value in fields if isinstance(value, str | int | float | bool)]
    return ", ".join(
        f"{key} {hide_folders(f'{value:.5g}' if isinstance(value, float) else value)}" for key, value in plain
    )


def _settings(values: Mapping[str, Any]) -> str:
    """Every leaf that has a value."""
    return table(["setting", "value"], [[key, value] for key, value in flattened(values) if value is not None])


# --- helpers ----------------------------------------------------------------------------------------------------------


def points_of(events: Sequence[Event], key: str) -> list[tuple[float, float]]:
    """(step, value) of the events that have a value under ``key``."""
    return [(event["step"], event[key]) for event in events if event.get(key) is not None]


def _signed(value: float | None) -> str:
    return "?" if value is None else f"{value:+.4f}"


def _images_of(validation: Event) -> int | None:
    """How many images a validation looked at, where it says so."""
    count = validation.get("images", validation.get("n"))
    return count if isinstance(count, int) else None


def _size(value: Any) -> str:
    return f"{value[0]}x{value[1]}" if isinstance(value, list) and len(value) == 2 else ""
