"""The door for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.config import load_config

if TYPE_CHECKING:
    from tuner.core.train.run import RunSummary


def train(
    config: str | Path | Mapping[str, Any],
    *,
    model: str | None = None,
    resume: str | None = None,
    base_dir: str | Path | None = None,
) -> RunSummary:
    """Run a training, as ``tuner train`` does.

    config: a file, or the settings as a dict, whose relative paths start at ``base_dir`` (the current folder when left
    out). model: as ``--model``. resume: ``auto`` or the path of a checkpoint. Raises UsageError for what the user can
    fix. The environment is not read.
    """
    from tuner.core.train.logs import set_up_logging
    from tuner.core.train.run import train as run

    raw = load_config(config, model=model, env={}, base_dir=Path(base_dir) if base_dir is not None else None)
    set_up_logging(raw)
    return run(raw, resume=resume)
