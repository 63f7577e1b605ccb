"""Line charts as inline SVG text: no library, no script, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 34
MAX_BINS = 400
"""A line is drawn with at most two points in each of so many vertical strips."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line. style: ``strong``, ``faint`` or ``dashed``; colour: 0 to 7; dots: mark and label every point."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    style: str = "strong"
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A filled area between (x, low, high) points."""

    name: str
    points: Sequence[tuple[float, float, float]]
    colour: int = 0


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    bands: Sequence[Band] = (),
    x_label: str = "step",
    zero: bool = False,
    clip: float = 0.0,
) -> str:
    """A titled chart as HTML, or the empty string when no line has a point.

    zero: the y axis contains 0. clip: share of the points at either end that may lie outside the y range, drawn at its
    edge, so that single outliers do not hide the rest.
    """
    shown = [_cleaned(line) for line in lines]
    shown = [line for line in shown if line.points]
    if not shown:
        return ""
    values = [y for line in shown for _, y in line.points]
    values += [bound for band in bands for _, low, high in band.points for bound in (low, high)]
    axis = _Axis.around([x for line in shown for x, _ in line.points])
    scale = _Axis.around(values, zero=zero, clip=clip)
    parts = [_grid(axis, scale, x_label)]
    parts += [_band(band, axis, scale) for band in bands if len(band.points) > 1]
    parts += [_line(line, axis, scale) for line in shown]
    entries = [_legend(band.name, band.colour, "band") for band in bands if band.points]
    entries += [_legend(line.name, line.colour, line.style) for line in shown]
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><div class="legend">{"".join(entries)}</div></figure>'
    )


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Exponential moving average over about ``window`` points, corrected for its start."""
    keep = 1.0 - 2.0 / (max(1, window) + 1.0)
    total = weight = 0.0
    result: list[Point] = []
    for x, y in points:
        total, weight = keep * total + (1.0 - keep) * y, keep * weight + (1.0 - keep)
        result.append((x, total / weight))
    return result


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    ticks: tuple[float, ...]

    @staticmethod
    def around(values: Sequence[float], *, zero: bool = False, clip: float = 0.0) -> _Axis:
        ordered = sorted(values)
        skip = int(clip * len(ordered))
        low, high = ordered[skip], ordered[len(ordered) - 1 - skip]
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            margin = abs(low) * 0.1 or 1.0
            low, high = low - margin, high + margin
        return _Axis(low, high, tuple(_ticks(low, high)))

    def share(self, value: float) -> float:
        """Place of a value on the axis, 0..1; values outside are at the edge."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def _x(axis: _Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: _Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between the ends."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def _grid(axis: _Axis, scale: _Axis, x_label: str) -> str:
    parts = []
    for tick in scale.ticks:
        y = _y(scale, tick)
        emphasis = ' class="zero"' if tick == 0 else ""
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"{emphasis}/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in axis.ticks:
        parts.append(
            f'<text x="{_x(axis, tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_number(tick)}</text>'
        )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_label)}</text>')
    return f'<g class="grid">{"".join(parts)}</g>'


def _line(line: Line, axis: _Axis, scale: _Axis) -> str:
    points = [(_x(axis, x), _y(scale, y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in _thinned(points))
    parts = [f'<polyline class="c{line.colour % 8} {line.style}" points="{path}"/>'] if len(points) > 1 else []
    if line.dots or len(points) == 1:
        for (x, y), (step, value) in zip(points, line.points, strict=True):
            label = f"{escape(line.name)} at {_number(step)}: {value:.5g}"
            parts.append(
                f'<circle class="c{line.colour % 8}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{label}</title></circle>'
            )
    return "".join(parts)


def _band(band: Band, axis: _Axis, scale: _Axis) -> str:
    upper = [f"{_x(axis, x):.1f},{_y(scale, high):.1f}" for x, _, high in band.points]
    lower = [f"{_x(axis, x):.1f},{_y(scale, low):.1f}" for x, low, _ in reversed(band.points)]
    return f'<polygon class="c{band.colour % 8}" points="{" ".join(upper + lower)}"/>'


def _legend(name: str, colour: int, style: str) -> str:
    return f'<span><i class="c{colour % 8} {style}"></i>{escape(name)}</span>'


def _cleaned(line: Line) -> Line:
    return replace(line, points=[(x, y) for x, y in line.points if math.isfinite(y)])


def _thinned(points: Sequence[Point]) -> list[Point]:
    """The lowest and the highest point of each strip, in their order: spikes stay visible."""
    if len(points) <= 2 * MAX_BINS:
        return list(points)
    size = math.ceil(len(points) / MAX_BINS)
    result: list[Point] = []
    for start in range(0, len(points), size):
        strip = points[start : start + size]
        ends = {min(range(len(strip)), key=lambda index: strip[index][1]),
                max(range(len(strip)), key=lambda index: strip[index][1])}  # fmt: skip
        result += [strip[index] for index in sorted(ends)]
    return result
