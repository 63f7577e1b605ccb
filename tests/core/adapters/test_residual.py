"""Starts other than the usual one: neutral, principal where they say so, and files that fit the original weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.adapters.test_kinds import randomize, run
from tests.core.adapters.toy import FACTS, MAPS, WIDTH, toy_config, toy_models, toy_x
from tuner.core.adapters.export import verify_export
from tuner.core.adapters.files import read_adapter, save_adapter
from tuner.core.adapters.formats import parts_of
from tuner.core.adapters.lora import inject_lora, split_bases
from tuner.core.adapters.merging import merge_into, read_addition
from tuner.core.adapters.network import (
    adapter_strength,
    adapter_summary,
    exported_tensors,
    load_network_tensors,
    network_tensors,
)
from tuner.core.adapters.residual import principal
from tuner.core.errors import UsageError
from tuner.core.rng import Rng
from tuner.core.types import Fused, Network

JOINT = replace(
    FACTS, lora=replace(FACTS.lora, fused=(Fused(parent=r"blocks\.\d+", members=("q", "k_proj"), rows=(1, 1)),))
)


def build(init: str, facts=FACTS, dtype: torch.dtype = torch.float32, **network: Any):
    models = toy_models()
    models.denoiser.to(dtype)
    section = {"rank": 2, "alpha": 3.0, "include": ["embed"], "init": init, **network}
    return models, inject_lora(models, toy_config(section), facts)


def trained_only(network: Network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network_tensors(network).items() if ".first_" not in name}


@pytest.mark.parametrize("facts", [FACTS, JOINT], ids=["single", "joint"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_it_starts_as_the_base_model_and_the_base_keeps_the_rest(init, facts):
    models, network = build(init, facts)
    plain = toy_models()
    torch.testing.assert_close(run(models), run(plain), rtol=1e-5, atol=1e-5)
    for path in ("embed", "blocks.1.q", "blocks.1.mlp.0"):
        rest, whole = (each.denoiser.get_submodule(path).weight for each in (models, plain))
        assert not torch.allclose(rest, whole, atol=1e-3)
        if init == "pissa" and (path != "blocks.1.q" or facts is FACTS):
            sizes = torch.linalg.svdvals(whole.flatten(1))
            torch.testing.assert_close(torch.linalg.svdvals(rest.flatten(1))[0], sizes[2], rtol=1e-4, atol=1e-5)
    assert all(bool(value.any()) for value in trained_only(network).values())


@pytest.mark.parametrize("facts", [FACTS, JOINT], ids=["single", "joint"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_its_file_does_to_the_original_weights_what_the_live_model_does(init, facts, tmp_path):
    models, network = build(init, facts)
    randomize(network)
    path = tmp_path / "a.safetensors"
    tensors = exported_tensors(network)
    save_adapter(tensors, MAPS.formats[0], path, {})
    assert verify_export(path, tensors, MAPS).modules == len(trained_only(network)) // 3
    assert all(value.shape[0] == 4 for name, value in tensors.items() if name.endswith("down"))
    original = toy_models()
    merge_into(original.denoiser, "denoiser", [read_addition(path, 1.0, MAPS, where="model.merge")])
    torch.testing.assert_close(run(models), run(original), rtol=1e-5, atol=1e-5)
    with adapter_strength(network, 0.0):
        torch.testing.assert_close(run(models), run(toy_models()), rtol=1e-5, atol=1e-5)
    half = toy_models()
    merge_into(half.denoiser, "denoiser", [read_addition(path, 0.5, MAPS, where="model.merge")])
    with adapter_strength(network, 0.5):
        torch.testing.assert_close(run(models), run(half), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_small_change_survives_the_dtype_of_the_file(init, dtype, tmp_path):
    _, network = build(init)
    with torch.no_grad():
        for name, value in network_tensors(network).items():
            if ".first_" not in name and value.ndim > 1:
                value.add_(1e-3 * Rng(1, name).normal(tuple(value.shape)))
    [layer] = [each for target, each in network.module.items() if target.path == "blocks.2.mlp.2"]
    wanted = (layer.up @ layer.down - layer.first_up @ layer.first_down).detach() * layer.alpha / layer.rank
    tensors = exported_tensors(network)
    save_adapter(tensors, MAPS.formats[0], tmp_path / "a.safetensors", {}, dtype)
    verify_export(tmp_path / "a.safetensors", tensors, MAPS)
    found = parts_of(read_adapter(tmp_path / "a.safetensors", MAPS).tensors, "denoiser", "blocks.2.mlp.2")
    change = found["up"].float() @ found["down"].float() * float(found["alpha"]) / len(found["down"])
    assert (change - wanted).norm() < (0.01 if dtype == torch.bfloat16 else 1e-4) * wanted.norm()


def test_in_bfloat16_it_starts_within_the_rounding_of_the_weights():
    models, _ = build("pissa", dtype=torch.bfloat16)
    plain = toy_models()
    plain.denoiser.to(torch.bfloat16)
    x = toy_x().bfloat16()
    exact = run(toy_models())
    error = (run(models, x).float() - exact).norm() / exact.norm()
    assert error < 2 * (run(plain, x).float() - exact).norm() / exact.norm()


def test_a_gaussian_start_has_deviation_one_by_rank_and_changes_no_bit():
    models, network = build("gaussian", rank=4)
    assert torch.equal(run(models), run(toy_models()))
    downs = torch.cat([value.flatten() for name, value in network_tensors(network).items() if name.endswith("down")])
    assert float(downs.std()) == pytest.approx(0.25, rel=0.15)
    assert downs.abs().max() > 0.5


def test_gradients_are_those_of_a_layer_beside_the_rest_of_the_weight():
    models, network = build("pissa")
    run(models).square().sum().backward()
    [layer] = [each for target, each in network.module.items() if target.path == "blocks.2.mlp.2"]
    found = layer.up.grad.clone()
    step = torch.zeros_like(layer.up)
    step[0, 0] = 1e-3
    sums = []
    for sign in (1, -1):
        layer.up.data += sign * step
        sums.append(float(run(models).double().square().sum().detach()))
        layer.up.data -= sign * step
    assert float(found[0, 0]) == pytest.approx((sums[0] - sums[1]) / 2e-3, rel=2e-2, abs=1e-3)


def test_the_tensors_of_a_shared_layer_go_into_one_file(tmp_path):
    _, network = build("pissa", JOINT)
    tensors = network_tensors(network)
    save_file(tensors, tmp_path / "state.safetensors")
    models = toy_models()
    config = toy_config({"rank": 2, "alpha": 3.0, "include": ["embed"], "init": "pissa"})
    split_bases(models, config, JOINT, stored=load_file(tmp_path / "state.safetensors"))
    again = inject_lora(models, config, JOINT)
    assert all(torch.equal(value, tensors[name]) for name, value in network_tensors(again).items())


def test_a_checkpoint_belongs_to_its_split():
    _, network = build("pissa")
    stored = {name: value.clone() for name, value in network_tensors(network).items()}
    randomize(network)
    load_network_tensors(network, stored)
    assert all(torch.equal(value, stored[name]) for name, value in network_tensors(network).items())
    other = {name: value + 1e-3 if "first_up" in name else value for name, value in stored.items()}
    with pytest.raises(UsageError, match="in another way"):
        load_network_tensors(network, other)
    assert all("rank 2" in row.settings for row in adapter_summary(network))


def test_the_random_decomposition_finds_the_principal_directions():
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(size, 60, generator=generator)).Q for size in (150, 90))
    matrix = left * (0.8 ** torch.arange(60)) @ right.t()
    found = principal(matrix, 8, Rng(1))
    exact = torch.linalg.svd(matrix)
    torch.testing.assert_close(found[1], exact.S[:8], rtol=1e-4, atol=0)
    product, wanted = (u[:, :8] * s[:8] @ v[:8] for u, s, v in (found, exact))
    torch.testing.assert_close(product, wanted, rtol=0, atol=1e-4)


def test_more_rank_than_the_weight_has_is_refused():
    with pytest.raises(UsageError, match="more than its weight has"):
        build("pissa", rank=WIDTH + 1)
    with pytest.raises(UsageError, match="no linear that is adapted is quantized"):
        build("loftq")
