"""Installed plugins, and the one model of a run behind a typed facade.

Names are imported when first used: ``tuner --help`` needs the catalog and must not pay for the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.core.registry.catalog import EXTENSIONS as EXTENSIONS
    from tuner.core.registry.catalog import MODELS as MODELS
    from tuner.core.registry.catalog import Catalog as Catalog
    from tuner.core.registry.catalog import Entry as Entry
    from tuner.core.registry.door import open_model as open_model
    from tuner.core.registry.door import without_training as without_training
    from tuner.core.registry.extensions import Extensions as Extensions
    from tuner.core.registry.facade import ModelFacade as ModelFacade
    from tuner.core.registry.facade import default_placement as default_placement
    from tuner.core.registry.presets import preset_names as preset_names
    from tuner.core.registry.presets import read_preset as read_preset
    from tuner.core.registry.problems import PluginProblem as PluginProblem
    from tuner.core.registry.run import Opened as Opened
    from tuner.core.registry.run import Run as Run
    from tuner.core.registry.run import family_of as family_of
    from tuner.core.registry.run import model_schema as model_schema
    from tuner.core.registry.run import open_facts as open_facts
    from tuner.core.registry.run import open_known as open_known
    from tuner.core.registry.run import open_public as open_public
    from tuner.core.registry.run import open_run as open_run
    from tuner.core.registry.run import typed_config as typed_config

_HOME = {
    "EXTENSIONS": "catalog",
    "MODELS": "catalog",
    "Catalog": "catalog",
    "Entry": "catalog",
    "Extensions": "extensions",
    "ModelFacade": "facade",
    "Opened": "run",
    "PluginProblem": "problems",
    "Run": "run",
    "default_placement": "facade",
    "family_of": "run",
    "model_schema": "run",
    "open_facts": "run",
    "open_known": "run",
    "open_model": "door",
    "open_public": "run",
    "open_run": "run",
    "preset_names": "presets",
    "read_preset": "presets",
    "typed_config": "run",
    "without_training": "door",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
