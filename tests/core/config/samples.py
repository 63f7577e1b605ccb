"""A smallest valid configuration, and how tests write, load and refuse variations of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuner.core.config import RunConfig, build_config, load_config
from tuner.core.config.document import merged
from tuner.core.errors import UsageError
from tuner.core.types import DtypeRules, LoraRules, ModelFacts, NoiseDefaults, SampleDefaults


def minimal(**sections: Any) -> dict[str, Any]:
    """A valid document with ``sections`` merged over it."""
    document = {
        "model": {"family": "toy", "path": "toy.safetensors"},
        "data": {"sets": [{"sources": [{"id": "hero", "path": "images"}]}]},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 100},
        "checkpoint": {"dir": "out/hero"},
    }
    return merged(document, sections)


def build(**sections: Any) -> RunConfig:
    return build_config(minimal(**sections))


def refusal(text_or_document: str | dict[str, Any], folder: Path, **options: Any) -> str:
    """The message for a document that must be refused; the temporary folder is shown as ``DIR``."""
    file = folder / "c.json"
    text = text_or_document if isinstance(text_or_document, str) else json.dumps(text_or_document)
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        build_config(load_config(file, env={}, **options))
    return str(caught.value).replace(str(folder), "DIR").replace("\\", "/")


def toy_facts(**changes: Any) -> ModelFacts:
    """Facts of a model that only exists in tests."""
    facts: dict[str, Any] = {
        "family": "toy",
        "flavour": "small",
        "components": ("text", "vae", "denoiser"),
        "trainable": ("denoiser", "text"),
        "text_components": ("text",),
        "latent_channels": 4,
        "spatial_factor": 8,
        "resolution_multiple": 16,
        "block_lists": (),
        "lora": LoraRules(include={"denoiser": (".*",)}, presets={"attention": ((), ())}, groups={"main": "blocks"}),
        "key_maps": "toy:MAPS",
        "dtypes": DtypeRules(),
        "text_fields": {},
        "max_tokens": {"text": 77},
        "files": {},
        "noise": NoiseDefaults(timesteps="shift", shift=3.0),
        "sample": SampleDefaults(steps=20, cfg=4.0, shift=3.0, size=(1024, 1024), multiple=16),
    }
    return ModelFacts(**(facts | changes))
