"""FLUX.1 dev, schnell and Chroma under the kit that every plugin passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fixtures.tiny_flux import Flavour, full_sizes, make_tiny_flux, original_shapes
from tests.fixtures.tiny_parts import clip_shapes, t5_shapes, vae_shapes
from tuner.core.testing import ModelConformance, write_empty_weights


def full_size(folder: Path, flavour: Flavour) -> dict[str, Any]:
    """Files of public size without values; the tokenizers are those of the tiny model."""
    model = make_tiny_flux(folder, flavour)
    write_empty_weights(Path(model["path"]), original_shapes(full_sizes(flavour)))
    write_empty_weights(Path(model["vae"]["path"]), vae_shapes(base=128))
    shapes = {"t5": t5_shapes(width=4096, layers=24, heads=64, head_dim=64, mlp_width=10240, vocab=32128)}
    if flavour != "chroma":
        shapes["clip_l"] = clip_shapes(width=768, layers=12, projection=None, vocab=49408)
    for name, each in shapes.items():
        write_empty_weights(Path(model["text_encoders"][name]["path"]), each)
    return {"model": model}


class FluxConformance(ModelConformance):
    plugin = "flux"
    flavour: Flavour

    def tiny_config(self, tmp_path: Path) -> dict[str, Any]:
        return {"model": make_tiny_flux(tmp_path / "model", self.flavour)}

    def full_size_config(self, tmp_path: Path) -> dict[str, Any]:
        return full_size(tmp_path, self.flavour)


class TestDev(FluxConformance):
    flavour = "dev"


class TestSchnell(FluxConformance):
    flavour = "schnell"


class TestChroma(FluxConformance):
    flavour = "chroma"
