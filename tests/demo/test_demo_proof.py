"""The proof reads the exported LoRA by itself: what it merges, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.demo.build.judge import Score
from examples.demo.build.net import TinyNet
from examples.demo.proof import HeldOut, checks, find_lora, merged

MODULE = "diffusion_model.blocks.0.cross_attn.k_proj"


def test_the_proof_adds_the_product_of_the_two_matrices_to_the_weight(tmp_path: Path) -> None:
    net = TinyNet()
    down, up = torch.randn(4, 128), torch.randn(192, 4)
    save_file({f"{MODULE}.lora_A.weight": down, f"{MODULE}.lora_B.weight": up}, tmp_path / "wug.safetensors")
    tuned, count = merged(net, find_lora(tmp_path))
    old, new = (each.denoiser.blocks[0].cross_attn.k_proj.weight for each in (net, tuned))
    assert count == 1
    assert torch.allclose(new - old, up @ down, atol=1e-5)


def test_the_proof_refuses_a_file_with_other_names(tmp_path: Path) -> None:
    save_file({"lora_unet_blocks_0_mlp_layer1.lora_down.weight": torch.zeros(1, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match="no LoRA in ComfyUI's names"):
        merged(TinyNet(), tmp_path / "other.safetensors")


def test_the_proof_fails_when_known_captions_are_lost_or_the_interval_reaches_zero() -> None:
    good, bad = Score(1.0, 1.0, 1.0, 1.0), Score(0.8, 1.0, 1.0, 0.8)
    lower, unsure = HeldOut(-0.5, -0.6, -0.4, 0.7), HeldOut(-0.1, -0.3, 0.1, 0.7)
    assert all(check.passed for check in checks(0.0, good, 1.0, good, good, lower))
    assert not all(check.passed for check in checks(0.0, good, 1.0, good, bad, lower))
    assert not all(check.passed for check in checks(0.0, good, 1.0, good, good, unsure))
    assert not all(check.passed for check in checks(0.0, good, 0.6, good, good, lower))
