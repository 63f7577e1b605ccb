"""Mosaic under the kit that every model plugin passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from tuner.core.testing import ModelConformance, write_empty_weights

import tiny


class TestMosaic(ModelConformance):
    plugin = "mosaic"
    round_trip: ClassVar[float | None] = 1e-6

    def tiny_config(self, tmp_path: Path) -> dict[str, Any]:
        return {"model": {"path": str(tiny.write(tmp_path / "tiny.safetensors"))}}

    def full_size_config(self, tmp_path: Path) -> dict[str, Any]:
        with torch.device("meta"):
            shapes = {name: tuple(value.shape) for name, value in tiny.tensors(width=1024, blocks=24).items()}
        return {"model": {"path": str(write_empty_weights(tmp_path / "full.safetensors", shapes))}}
