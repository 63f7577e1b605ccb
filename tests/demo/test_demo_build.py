"""The script that made the demo model still runs from nothing, in a few steps of everything."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from examples.demo.build.build import SMOKE, build
from examples.demo.build.muon import orthogonal

MODELS = Path(__file__).parents[2] / "examples" / "demo" / "models"


def test_the_build_script_makes_the_committed_files_from_nothing(tmp_path: Path) -> None:
    numbers = build(tmp_path, SMOKE)
    assert {"vae_psnr_db", "samples_all", "reader_shape"} <= set(numbers)
    committed = {path.relative_to(MODELS) for path in MODELS.rglob("*") if path.is_file()}
    made = {path.relative_to(tmp_path / "models") for path in (tmp_path / "models").rglob("*") if path.is_file()}
    assert made == committed
    for name in ("anima_tiny.safetensors", "vae.safetensors", "qwen3/model.safetensors"):
        old, new = load_file(MODELS / name), load_file(tmp_path / "models" / name)
        assert {key: (value.shape, value.dtype) for key, value in old.items()} == {
            key: (value.shape, value.dtype) for key, value in new.items()
        }
    for name in ("qwen3/tokenizer.json", "t5/tokenizer.json", "qwen3/config.json"):
        assert (MODELS / name).read_text() == (tmp_path / "models" / name).read_text()


def test_the_newton_schulz_iteration_gives_nearly_orthogonal_rows() -> None:
    matrices = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonal(matrices))
    assert singular.min() > 0.5
    assert singular.max() < 1.3
