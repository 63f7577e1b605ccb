"""Installed plugins, and the one model of a run behind a typed facade."""

from __future__ import annotations

from tuner.core.registry.catalog import EXTENSIONS, MODELS, Catalog, Entry
from tuner.core.registry.door import open_model
from tuner.core.registry.extensions import Extensions
from tuner.core.registry.facade import ModelFacade, default_placement
from tuner.core.registry.presets import preset_names, read_preset
from tuner.core.registry.problems import PluginProblem
from tuner.core.registry.run import Opened, Run, model_schema, open_facts, open_run, typed_config

__all__ = [
    "EXTENSIONS",
    "MODELS",
    "Catalog",
    "Entry",
    "Extensions",
    "ModelFacade",
    "Opened",
    "PluginProblem",
    "Run",
    "default_placement",
    "model_schema",
    "open_facts",
    "open_model",
    "open_run",
    "preset_names",
    "read_preset",
    "typed_config",
]
