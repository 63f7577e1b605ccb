"""SD3, 3.5 medium and 3.5 large under the kit that every plugin passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fixtures.tiny_parts import clip_shapes, t5_shapes, vae_shapes
from tests.fixtures.tiny_sd3 import all_in_one, denoiser_shapes, make_tiny_sd3
from tuner.core.testing import ModelConformance, write_empty_weights

FULL = {
    "sd3m": {"width": 1536, "blocks": 24, "side": 192, "qk_norm": False, "dual": ()},
    "sd35m": {"width": 1536, "blocks": 24, "side": 384, "qk_norm": True, "dual": tuple(range(13))},
    "sd35l": {"width": 2432, "blocks": 38, "side": 192, "qk_norm": True, "dual": ()},
}
"""Public sizes."""


def full_size(folder: Path, flavour: str) -> dict[str, Any]:
    """An all-in-one file of public size without values; the tokenizers are those of the tiny model."""
    model = make_tiny_sd3(folder, flavour=flavour)
    parts = {
        "denoiser": denoiser_shapes(**FULL[flavour], text=4096, pooled=2048),
        "vae": vae_shapes(base=128),
        "clip_l": clip_shapes(width=768, layers=12, projection=768, vocab=49408),
        "clip_g": clip_shapes(width=1280, layers=32, projection=1280, vocab=49408),
        "t5": t5_shapes(width=4096, layers=24, heads=64, head_dim=64, mlp_width=10240, vocab=32128),
    }
    write_empty_weights(Path(model["path"]), all_in_one(parts))
    return {"model": model}


class SD3Conformance(ModelConformance):
    plugin = "sd3"
    flavour: str

    def tiny_config(self, tmp_path: Path) -> dict[str, Any]:
        return {"model": make_tiny_sd3(tmp_path / "model", flavour=self.flavour)}

    def full_size_config(self, tmp_path: Path) -> dict[str, Any]:
        return full_size(tmp_path, self.flavour)


class TestMedium(SD3Conformance):
    flavour = "sd3m"


class TestMedium35(SD3Conformance):
    flavour = "sd35m"


class TestLarge35(SD3Conformance):
    flavour = "sd35l"
