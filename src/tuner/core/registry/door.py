"""The door for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.core.config.document import merged
from tuner.core.errors import UsageError
from tuner.core.registry.catalog import Catalog
from tuner.core.registry.facade import ModelFacade
from tuner.core.registry.run import open_run

# A model can be used without training: what the schema demands for a training has no meaning here.
_NO_TRAINING: Mapping[str, Any] = {
    "data": {"sets": [{"sources": [{"id": "none", "path": "."}]}]},
    "optimizer": {"lr": 1e-4},
    "train": {"steps": 1},
    "checkpoint": {"dir": "."},
}


def open_model(
    name: str,
    model: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    base_dir: Path | None = None,
    catalog: Catalog | None = None,
) -> ModelFacade:
    """Open a model by the name of its plugin; nothing is loaded before ``load_models`` is called.

    model: the ``model`` section of a configuration. settings: further sections, such as ``{"precision": {"compute":
    "fp32"}}``. base_dir: what relative paths are relative to, the current folder by default.
    """
    if model.get("merge"):
        raise UsageError(
            "a model is opened as its files are",
            where="model.merge",
            why="adapters are merged in training runs alone",
            fix="take it out",
        )
    sections = merged(_NO_TRAINING, settings or {})
    return open_run(sections | {"model": {"family": name} | dict(model)}, base_dir=base_dir, catalog=catalog).model
