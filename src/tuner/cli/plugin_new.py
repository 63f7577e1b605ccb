"""``tuner plugins new``: the start of a plugin, which works as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tuner.cli.console import out


def new(name: str, template: Literal["model", "extension"], parent: str | None) -> int:
    """Write the files and say what to do with them."""
    from tuner.core.lifecycle.scaffold import write_plugin

    folder = Path(parent or ".")
    written = write_plugin(name, template, folder)
    for path in written:
        out(f"wrote {path}")
    out(f'\nnext: python -m pip install -e "{folder / f"tuner-{name}"}[dev]"')
    out(f"      python -m pytest {folder / f'tuner-{name}'}")
    out(f"      tuner plugins check {name}")
    return 0
