"""Presets of installed models: every one of them is a valid base for a run."""

from __future__ import annotations

import pytest

from tuner.core.config import build_config, load_config
from tuner.core.config.document import merged
from tuner.core.errors import UsageError
from tuner.core.registry import MODELS, Catalog, model_schema, preset_names, read_preset

CATALOG = Catalog()
BUILTIN = [entry.name for entry in CATALOG.entries(MODELS) if entry.builtin]
PRESETS = [f"{name}/{preset}" for name in BUILTIN for preset in preset_names(CATALOG, name)]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_the_schema(name: str) -> None:
    rest = {
        "model": {"path": "x.safetensors"},
        "data": {"sets": [{"sources": [{"id": "a", "path": "a"}]}]},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"dir": "out"},
    }
    preset = read_preset(CATALOG, name)
    length = {} if {"steps", "epochs"} & set(preset.get("train", {})) else {"train": {"steps": 1}}
    raw = load_config(merged(rest, length), preset=preset, env={})
    build_config(raw, model_schema(CATALOG, name.split("/")[0]))


def test_a_preset_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(UsageError, match="there is no preset"):
        read_preset(CATALOG, f"{BUILTIN[0]}/nothing")
    with pytest.raises(UsageError, match="a preset is named MODEL/PRESET"):
        read_preset(CATALOG, "nothing")
