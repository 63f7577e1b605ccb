"""The cheap half of the conformance kit: what can be said about an installed plugin without weights and without pytest.

Importing a plugin runs its code, so ask for the plugins to check by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from tuner.core.config import ModelConfigBase, build_config
from tuner.core.config.document import merged
from tuner.core.config.foreign import ForeignFamily
from tuner.core.errors import UsageError
from tuner.core.files import WeightHeader
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
FUNCTIONS = ("files", "detect", "facts", "recognise", "public", "count_tokens")
"""Parts of a descriptor that are called."""
_STRANGE = WeightHeader(Path("strange.safetensors"), {})


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
        yield from _schema(catalog, entry)
        for part in FUNCTIONS:
            if (reference := getattr(model, part)) is None:
                continue
            found = catalog.load(entry, "descriptor", reference)
            if not callable(found):
                yield f"{part} of its descriptor is not a function: {reference}"
            elif part in ("detect", "recognise") and catalog.call(entry, part, found, _STRANGE):
                yield f"{part} of its descriptor takes a file without tensors for one of this family: {reference}"
        yield from _maps(catalog, entry, model)
        yield from _importers(catalog, entry, model)
        yield from _presets(catalog, entry)
    if not before and "torch" in sys.modules:
        yield "reading its descriptor imports torch; import it only in the hooks module"


def _schema(catalog: Catalog, entry: Entry) -> Iterator[str]:
    """The keys of its ``model`` section."""
    schema = model_schema(catalog, entry.name)
    family = schema.model_fields["family"].annotation
    if get_origin(family) is Literal and entry.name not in get_args(family):
        yield f"family of {schema.__name__} is {get_args(family)[0]!r}, but the plugin is called {entry.name!r}"
    for name in schema.unused:
        if name not in schema.model_fields:
            guess = get_close_matches(name, schema.model_fields, n=1)
            yield f"unused of {schema.__name__} names {name!r}, which is no key of it" + (
                f"\n  fix: did you mean {guess[0]!r}?" if guess else ""
            )


def _importers(catalog: Catalog, entry: Entry, model: ModelPlugin) -> Iterator[str]:
    if model.importers is None:
        return
    tables = catalog.load(entry, "descriptor", model.importers)
    lists = [*tables.values()] if isinstance(tables, Mapping) else [tables]
    if not all(isinstance(each, tuple) and all(isinstance(row, ForeignFamily) for row in each) for each in lists):
        yield f"{model.importers} is not a table of programs with a tuple of ForeignFamily each"


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
