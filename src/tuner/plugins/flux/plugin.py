"""The descriptor that the entry point names."""

from __future__ import annotations

from tuner.core.types import ModelPlugin

plugin = ModelPlugin(
    name="flux",
    api=(1, 0),
    config="tuner.plugins.flux.config:FluxConfig",
    files="tuner.plugins.flux.sources:files",
    detect="tuner.plugins.flux.facts:detect",
    facts="tuner.plugins.flux.facts:facts",
    public="tuner.plugins.flux.facts:public",
    hooks="tuner.plugins.flux.hooks",
    presets="tuner.plugins.flux.presets",
    key_maps="tuner.plugins.flux.names:MAPS",
    count_tokens="tuner.plugins.flux.sources:count_tokens",
    importers="tuner.plugins.flux.importers:IMPORTERS",
    weight_maps="tuner.plugins.flux.stored:WEIGHTS",
    recognise="tuner.plugins.flux.facts:recognise",
)
