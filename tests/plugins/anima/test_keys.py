"""The tensors that a file must have are those of the modules; a file that lacks some is told before it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.tiny_anima import ADAPTER, DENOISER, VAE_BASE, vae_stages
from tuner.core.config import RunConfig
from tuner.core.errors import UsageError
from tuner.plugins.anima.denoiser import Denoiser
from tuner.plugins.anima.facts import facts
from tuner.plugins.anima.keys import adapter_keys, denoiser_keys
from tuner.plugins.anima.latents import VAE
from tuner.plugins.anima.text import LLMAdapter
from tuner.plugins.anima.vae_names import expected_names


def keys(module: torch.nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("rank", [0, 16])
def test_the_denoisers_tensors_are_those_of_its_module(rank: int) -> None:
    sizes = replace(DENOISER, adaln_rank=rank)
    with torch.device("meta"):
        assert denoiser_keys(sizes) == keys(Denoiser(sizes))


@pytest.mark.parametrize("changes", [{}, {"embed_width": 32}, {"embed_width": 32, "in_proj_bias": True}])
def test_the_adapters_tensors_are_those_of_its_module(changes: dict[str, Any]) -> None:
    sizes = replace(ADAPTER, **changes)
    with torch.device("meta"):
        assert adapter_keys(sizes) == keys(LLMAdapter(sizes))


def test_the_vaes_tensors_are_those_of_its_module() -> None:
    with torch.device("meta"):
        found = keys(VAE(*vae_stages(VAE_BASE), VAE_BASE))
    assert expected_names(found) == found
    assert expected_names(found - {"encoder.downsamples.3.residual.2.weight", "decoder.head.0.gamma"}) == found


def test_what_all_files_lack_is_told_at_once(
    tiny: dict[str, Any], run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    for part, lost in (("path", "net.blocks.1.mlp.layer2.weight"), ("vae", "encoder.downsamples.3.residual.2.weight")):
        source = Path(tiny["path"] if part == "path" else tiny["vae"]["path"])
        tensors = load_file(source)
        del tensors[lost]
        save_file(tensors | {"extra.weight": torch.zeros(1)}, tmp_path / source.name)
    model = tiny | {"path": str(tmp_path / "anima.safetensors"), "vae": {"path": str(tmp_path / "vae.safetensors")}}
    with pytest.raises(UsageError) as caught:
        facts(run_config(model))
    message = str(caught.value)
    assert (
        f"{tmp_path / 'anima.safetensors'}\n  why: missing: blocks.1.mlp.layer2.weight; unknown: extra.weight"
        in message
    )
    lost = "missing: encoder.downsamples.3.residual.2.weight; unknown: extra.weight"
    assert f"{tmp_path / 'vae.safetensors'}\n  why: {lost}" in message
