"""SD3, 3.5 medium and 3.5 large under the kit that every plugin passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fixtures.full_size import full_size_sd3
from tests.fixtures.tiny_sd3 import make_tiny_sd3
from tuner.core.testing import ModelConformance


class SD3Conformance(ModelConformance):
    plugin = "sd3"
    flavour: str

    def tiny_config(self, tmp_path: Path) -> dict[str, Any]:
        return {"model": make_tiny_sd3(tmp_path / "model", flavour=self.flavour)}

    def full_size_config(self, tmp_path: Path) -> dict[str, Any]:
        return {"model": full_size_sd3(tmp_path, self.flavour)}


class TestMedium(SD3Conformance):
    flavour = "sd3m"


class TestMedium35(SD3Conformance):
    flavour = "sd35m"
    compiler = "inductor"


class TestLarge35(SD3Conformance):
    flavour = "sd35l"
