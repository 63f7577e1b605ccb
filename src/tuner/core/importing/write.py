"""The imported configuration as text: JSON with a comment where a reader would ask why."""

from __future__ import annotations

from pathlib import Path as FilePath

from tuner.core.config.jsonc import Path
from tuner.core.config.locations import absolute_paths
from tuner.core.config.write import in_order, one_line, written_object
from tuner.core.importing.report import Imported, fill_in
from tuner.core.importing.source import shown_value


def config_text(result: Imported) -> str:
    """The document, with a comment above every key that was a default there, means something else, or is a guess."""
    comments: dict[Path, str] = {}
    for row in result.rows:
        if row.note and row.keys and row.status in ("default", "changed", "missing"):
            shown = row.option if row.value is None else f"{row.option} {shown_value(row.value)}"
            comments.setdefault(row.keys[0], f"{shown}: {row.note}" if row.status != "default" else row.note)
    head = [f"// Imported from {result.tool} by tuner config import."]
    head += [f"// Not taken over: {row.option} ({row.note})" for row in result.rows if row.status == "not_built"]
    head += [f"// Still to do: {text.splitlines()[0]}" for text in result.open]
    return "\n".join([*map(one_line, head), written_object(in_order(result.config), comments)]) + "\n"


def relocated(result: Imported, base: FilePath, home: FilePath) -> Imported:
    """The same result for a file in the folder ``home``: relative paths of the source started at ``base``."""
    if base == home:
        return result
    config = absolute_paths(result.config, base)
    moved = Imported(result.tool, config, result.rows, result.open)
    fill_in(moved.rows, moved.config)
    return moved
