"""The descriptor that the entry point names."""

from __future__ import annotations

from tuner.core.types import ModelPlugin

plugin = ModelPlugin(
    name="sd3",
    api=(1, 0),
    config="tuner.plugins.sd3.config:SD3Config",
    files="tuner.plugins.sd3.sources:files",
    detect="tuner.plugins.sd3.facts:detect",
    facts="tuner.plugins.sd3.facts:facts",
    public="tuner.plugins.sd3.facts:public",
    hooks="tuner.plugins.sd3.hooks",
    presets="tuner.plugins.sd3.presets",
    key_maps="tuner.plugins.sd3.names:MAPS",
    count_tokens="tuner.plugins.sd3.sources:count_tokens",
    importers="tuner.plugins.sd3.importers:IMPORTERS",
    weight_maps="tuner.plugins.sd3.stored:WEIGHTS",
    recognise="tuner.plugins.sd3.facts:recognise",
)
