"""The descriptor that the entry point names."""

from __future__ import annotations

from tuner import ModelPlugin

plugin = ModelPlugin(
    name="mosaic",
    api=(1, 0),
    config="tuner_mosaic.config:MosaicConfig",
    files="tuner_mosaic.facts:files",
    detect="tuner_mosaic.facts:detect",
    facts="tuner_mosaic.facts:facts",
    hooks="tuner_mosaic.hooks",
    presets="tuner_mosaic.presets",
    key_maps="tuner_mosaic.facts:MAPS",
)
