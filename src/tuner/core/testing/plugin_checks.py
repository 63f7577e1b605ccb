"""Checks of what a plugin declares: nothing is computed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from tuner.core.config import resolved_text
from tuner.core.registry import Catalog, preset_names, read_preset
from tuner.core.testing.bench import Bench, open_document
from tuner.core.testing.facts import fact_problems
from tuner.core.types import Models, Placement

READ_FACTS = """
import json, sys
from pathlib import Path
from tuner.core.registry import Catalog, open_facts, preset_names, typed_config
catalog = Catalog()
raw = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
model = catalog.model(raw["model"]["family"])
preset_names(catalog, model.name)
open_facts(typed_config(raw, catalog), catalog)
heavy = {"torch", "transformers", "diffusers"} & set(sys.modules)
sys.exit(f"imported: {', '.join(sorted(heavy))}" if heavy else 0)
"""


class PluginChecks:
    """Descriptor, facts and presets."""

    def test_reading_the_plugin_imports_no_torch(self, bench: Bench) -> None:
        """Configuration, facts and presets are read by commands that must answer at once."""
        path = bench.folder / "document.json"
        path.write_text(json.dumps(bench.config()), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", READ_FACTS, str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr

    def test_the_api_and_the_hooks_fit_this_version(self, bench: Bench) -> None:
        """Opening a run checks the API version, every hook's name and arguments, and that each has its one owner."""
        assert bench.run.facts.family == bench.plugin
        assert bench.run.manifest["plugins"][0]["name"] == bench.plugin

    def test_every_fact_holds_on_the_tiny_model(self, bench: Bench) -> None:
        assert fact_problems(bench.run.facts, on_meta(bench)) == []

    def test_every_fact_and_preset_of_the_adapter_holds_at_full_size(self, full_size: Bench) -> None:
        assert fact_problems(full_size.run.facts, on_meta(full_size)) == []

    def test_the_resolved_configuration_describes_the_same_run(self, bench: Bench) -> None:
        """What a run writes beside its files can be trained again."""
        config = bench.run.config
        assert open_document(json.loads(resolved_text(config))).config == config

    def test_every_preset_is_a_valid_configuration(self, bench: Bench) -> None:
        catalog = Catalog()
        for name in preset_names(catalog, bench.plugin):
            preset = read_preset(catalog, f"{bench.plugin}/{name}")
            changed = {key: value for key, value in preset.items() if key != "model"}
            opened = open_document(bench.config(**changed))
            assert opened.facts.family == bench.plugin, name


def on_meta(bench: Bench) -> Models:
    """The components that can train, as names and shapes."""
    with torch.device("meta"):
        return bench.run.model.load_models(bench.run.facts.trainable, Placement(device="meta"))
