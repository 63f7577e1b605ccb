"""FLUX.1 dev, schnell and Chroma under the kit that every plugin passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fixtures.full_size import full_size_flux
from tests.fixtures.tiny_flux import Flavour, make_tiny_flux
from tuner.core.testing import ModelConformance


class FluxConformance(ModelConformance):
    plugin = "flux"
    flavour: Flavour

    def tiny_config(self, tmp_path: Path) -> dict[str, Any]:
        return {"model": make_tiny_flux(tmp_path / "model", self.flavour)}

    def full_size_config(self, tmp_path: Path) -> dict[str, Any]:
        return {"model": full_size_flux(tmp_path, self.flavour)}


class TestDev(FluxConformance):
    flavour = "dev"
    compiler = "inductor"


class TestSchnell(FluxConformance):
    flavour = "schnell"


class TestChroma(FluxConformance):
    flavour = "chroma"
