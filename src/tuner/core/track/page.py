"""The parts of a self-contained HTML page: style, tables, embedded pictures, and text without the user's folders."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

MAX_IMAGE_WIDTH = 1400

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c2128; --soft: #5a6472; --line: #d9dee5; --card: #f5f7f9;
  --c0: #2563c9; --c1: #d1491f; --c2: #1a8a55; --c3: #8a4fc0; --c4: #b07d00; --c5: #0e8a97;
  --c6: #c03a7f; --c7: #667080; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --fg: #e4e8ed; --soft: #98a2af; --line: #323a44;
  --card: #1c2127; --c0: #6ea4ff; --c1: #ff8a62; --c2: #58c98f; --c3: #bf93f0; --c4: #e0b34a; --c5: #55c6d3;
  --c6: #f07fb8; --c7: #9aa5b4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 64px; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 19px; margin: 40px 0 12px; }
p { margin: 6px 0; } .soft { color: var(--soft); } .good { color: var(--c2); } .bad { color: var(--c1); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 10px; margin: 18px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 20px; overflow-wrap: anywhere; } .tile small { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 18px; }
@media (max-width: 560px) { .charts { grid-template-columns: 1fr; } }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; }
svg .grid line { stroke: var(--line); stroke-width: 1; } svg .grid line.zero { stroke: var(--soft); }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
polyline { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
polyline.faint { stroke-width: 1; opacity: .35; } polyline.dashed { stroke-dasharray: 6 5; }
polygon { fill: var(--c); opacity: .16; } circle { fill: var(--c); }
.legend { color: var(--soft); font-size: 13px; } .legend span { margin-right: 16px; white-space: nowrap; }
.legend i { display: inline-block; width: 18px; border-top: 2px solid var(--c); margin-right: 6px;
  vertical-align: middle; }
.legend i.faint { opacity: .4; } .legend i.dashed { border-top-style: dashed; }
.legend i.band { border-top-width: 9px; opacity: .25; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { max-height: 420px; overflow: auto; border: 1px solid var(--line); border-radius: 8px; padding: 0 12px; }
img { max-width: 100%; border-radius: 6px; border: 1px solid var(--line); }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
""" + "\n".join(f".c{index} {{ --c: var(--c{index}); }}" for index in range(8))

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy of the page: nothing is ever loaded from elsewhere, and no script runs."""

_PATH_IN_TEXT = re.compile(r"(?<![\w.:/\\…])(?:~|[A-Za-z]:|\\)?[/\\](?:[^\s\"'<>|*?:;,()]*[/\\])([^\s\"'<>|*?:;,()]*)")


def page(title: str, body: str) -> str:
    """A whole HTML document that loads nothing from elsewhere. title: plain text; body: HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def section(title: str, content: str) -> str:
    """A titled part of the page; nothing when it has no content."""
    return f"<h2>{escape(title)}</h2>\n{content}\n" if content else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, scroll: bool = False) -> str:
    """A table; numbers are right-aligned, None is an empty cell. No rows: the empty string."""
    body = []
    numeric = [True] * len(columns)
    for row in rows:
        numeric = [flag and _is_number(cell) for flag, cell in zip(numeric, row, strict=True)]
        body.append("".join(f"<td{_align(_is_number(cell))}>{_cell(cell)}</td>" for cell in row))
    if not body:
        return ""
    head = "".join(f"<th{_align(flag)}>{escape(name)}</th>" for name, flag in zip(columns, numeric, strict=True))
    rendered = "".join(f"<tr>{cells}</tr>" for cells in body)
    result = f"<table><thead><tr>{head}</tr></thead><tbody>{rendered}</tbody></table>"
    return f'<div class="scroll">{result}</div>' if scroll else result


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Boxes of (title, value, note)."""
    boxes = [
        f'<div class="tile"><small>{escape(title)}</small><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for title, value, note in entries
    ]
    return f'<div class="tiles">{"".join(boxes)}</div>' if boxes else ""


def details(summary: str, content: str) -> str:
    """A part of the page that opens at a click; nothing when it has no content. summary: plain text."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def picture(path: Path, description: str) -> str:
    """The file as an embedded picture, at most `MAX_IMAGE_WIDTH` wide, as JPEG or PNG, whichever is smaller."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if image.width > MAX_IMAGE_WIDTH:
        height = max(1, round(image.height * MAX_IMAGE_WIDTH / image.width))
        image = image.resize((MAX_IMAGE_WIDTH, height), Image.Resampling.LANCZOS)
    encoded = []
    for kind, options in (("jpeg", {"quality": 88}), ("png", {"optimize": True})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, data = min(encoded)
    text = base64.b64encode(data).decode("ascii")
    return f'<img alt="{escape(description)}" src="data:image/{kind};base64,{text}">'


def flattened(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """(dotted path, leaf) of a JSON document; short lists of plain values are leaves."""
    if isinstance(value, Mapping):
        if not value:
            return [(path, "{}")]
        return [leaf for key, each in value.items() for leaf in flattened(each, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list | tuple):
        if not any(isinstance(each, Mapping | list | tuple) for each in value):
            return [(path, ", ".join(_text(hide_folders(each)) for each in value))]
        return [leaf for index, each in enumerate(value) for leaf in flattened(each, f"{path}[{index}]")]
    return [(path, value)]


def hide_folders(value: Any) -> Any:
    """Text without absolute paths: only the last name of each is kept, because a report is passed on."""
    if not isinstance(value, str):
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        whole = kind(value)
        if "\n" not in value and (whole.is_absolute() or value.startswith(("~", "\\\\"))):
            return f"…/{whole.name}"
    return _PATH_IN_TEXT.sub(r"…/\1", value)


def _cell(value: Any) -> str:
    return escape(_text(hide_folders(value)))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _align(number: bool) -> str:
    return ' class="n"' if number else ""
