"""From a translation to the finished result."""

from __future__ import annotations

from typing import Any

from tuner.core.config.model import ModelConfigBase
from tuner.core.importing.apply import Translation
from tuner.core.importing.report import Imported, fill_in
from tuner.core.importing.settle import drop_defaults, settle

# What a document needs to be checked when it holds the data section alone.
_REST: dict[str, Any] = {
    "model": {"family": "none", "path": "none"},
    "optimizer": {"lr": 1e-4},
    "train": {"steps": 1},
    "checkpoint": {"dir": "none"},
}


def finish(tool: str, into: Translation, schema: type[ModelConfigBase], *, only_data: bool = False) -> Imported:
    """Check everything against the schema, leave out defaults, and fill in the report. ``only_data``: the source was a
    data set, so the result is a file for ``data.include``."""
    rest = {key: dict(value) for key, value in _REST.items() if key not in into.config} if only_data else {}
    checked = into.config | rest
    left = settle(checked, into.rows, schema if not rest.get("model") else ModelConfigBase)
    into.config = {key: value for key, value in checked.items() if key not in rest}
    drop_defaults(into.config, into.rows)
    into.rows = [row for row in into.rows if row.status != "default" or row.keys or "left" in row.note]
    for row in into.rows:
        if row.status == "mapped" and not row.keys and not row.note:
            row.note = "as here"
    fill_in(into.rows, into.config)
    return Imported(tool, into.config, into.rows, left)
