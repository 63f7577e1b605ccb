"""The descriptor that the entry point names."""

from __future__ import annotations

from tuner import ExtensionPlugin

plugin = ExtensionPlugin(name="caption-log", api=(1, 0), hooks="tuner_caption_log.hooks")
