"""The door for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.core.config.document import RawConfig, merged
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
_LENGTHS = ("steps", "epochs")


def without_training(raw: RawConfig) -> RawConfig:
    """``raw`` with what the schema demands for a training, where it says nothing of it: for commands that do not train.

    A configuration for pictures needs a ``model`` section and nothing else.
    """
    filled = dict(raw)
    for name, section in _NO_TRAINING.items():
        given = raw.get(name)
        if given is None:
            filled[name] = section
        elif isinstance(given, Mapping) and name != "data" and not (name == "train" and given.keys() & _LENGTHS):
            filled[name] = merged(section, given)
    return RawConfig(filled, raw.origins, raw.homes)


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
