"""The cheap half of the conformance kit: what can be said about an installed plugin without weights and without pytest.

Importing a plugin runs its code, so ask for the plugins to check by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tuner.core.config import ModelConfigBase, build_config
from tuner.core.config.document import merged
from tuner.core.errors import UsageError
from tuner.core.registry import EXTENSIONS, MODELS, Catalog, Entry, model_schema, preset_names, read_preset
from tuner.core.registry.ownership import hook_problems
from tuner.core.types import KeyMaps, ModelPlugin, WeightMaps

_COMPLETE: Mapping[str, Any] = {
    "model": {"path": "weights.safetensors"},
    "data": {"sets": [{"sources": [{"id": "images", "path": "images"}]}]},
    "optimizer": {"lr": 1e-4},
    "train": {"steps": 1},
    "checkpoint": {"dir": "out"},
}


def plugin_problems(catalog: Catalog, entry: Entry) -> list[str]:
    """Everything found wrong with one plugin, each as a sentence; empty when it can be used."""
    try:
        return [*_light(catalog, entry), *_hooks(catalog, entry)]
    except UsageError as problem:
        return [str(problem)]


def _light(catalog: Catalog, entry: Entry) -> Iterator[str]:
    """What is read before a run: it must not import torch."""
    before = "torch" in sys.modules
    if entry.group == EXTENSIONS:
        catalog.extension(entry.name)
    else:
        model = catalog.model(entry.name)
        model_schema(catalog, entry.name)
        for part in ("files", "detect", "facts", *(["recognise"] if model.recognise else [])):
            found = catalog.load(entry, "descriptor", getattr(model, part))
            if not callable(found):
                yield f"{part} of its descriptor is not a function: {getattr(model, part)}"
        yield from _maps(catalog, entry, model)
        yield from _presets(catalog, entry)
    if not before and "torch" in sys.modules:
        yield "reading its descriptor imports torch; import it only in the hooks module"


def _maps(catalog: Catalog, entry: Entry, model: ModelPlugin) -> Iterator[str]:
    if model.key_maps is None:
        yield "key_maps is not set: `tuner convert` cannot read its adapters"
        return
    maps = catalog.load(entry, "descriptor", model.key_maps)
    if not isinstance(maps, KeyMaps):
        yield f"{model.key_maps} is not a KeyMaps"
    elif maps.format(maps.default) is None:
        yield f"the default adapter format {maps.default!r} is not among its formats"
    if model.weight_maps is not None:
        weights = catalog.load(entry, "descriptor", model.weight_maps)
        if not isinstance(weights, WeightMaps):
            yield f"{model.weight_maps} is not a WeightMaps"
        elif "denoiser" not in weights.prefixes or "denoiser" not in weights.folders:
            yield "its WeightMaps do not say where the denoiser is"


def _presets(catalog: Catalog, entry: Entry) -> Iterator[str]:
    for name in preset_names(catalog, entry.name):
        preset = read_preset(catalog, f"{entry.name}/{name}")
        settings = {key: value for key, value in preset.items() if key != "model"}
        complete = merged(merged(_COMPLETE, {"model": {"family": entry.name}}), settings)
        try:
            # The model's own section needs files to be complete, so only the sections of the core are checked.
            build_config(complete, ModelConfigBase)
        except UsageError as problem:
            yield f"preset {entry.name}/{name}: {problem}"


def _hooks(catalog: Catalog, entry: Entry) -> Iterator[str]:
    is_model = entry.group == MODELS
    hooks = (catalog.model(entry.name) if is_model else catalog.extension(entry.name)).hooks
    module = catalog.load(entry, "hooks", hooks)
    for problem in hook_problems(f"plugin '{entry.name}' {entry.version}", module, is_model=is_model):
        yield str(problem)
