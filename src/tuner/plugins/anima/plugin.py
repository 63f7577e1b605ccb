"""The descriptor that the entry point names."""

from __future__ import annotations

from tuner.core.types import ModelPlugin

plugin = ModelPlugin(
    name="anima",
    api=(1, 0),
    config="tuner.plugins.anima.config:AnimaConfig",
    files="tuner.plugins.anima.sources:files",
    detect="tuner.plugins.anima.facts:detect",
    facts="tuner.plugins.anima.facts:facts",
    public="tuner.plugins.anima.facts:public",
    hooks="tuner.plugins.anima.hooks",
    presets="tuner.plugins.anima.presets",
    key_maps="tuner.plugins.anima.names:MAPS",
    count_tokens="tuner.plugins.anima.sources:count_tokens",
    importers="tuner.plugins.anima.importers:IMPORTERS",
    weight_maps="tuner.plugins.anima.stored:WEIGHTS",
    recognise="tuner.plugins.anima.facts:recognise",
)
