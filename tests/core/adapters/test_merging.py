"""Adding adapters of every kind to the weights of a loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.core.adapters.test_kinds import KINDS, build, merged, randomize, run
from tests.core.adapters.toy import MAPS, toy_models, toy_x
from tuner.core.adapters.files import save_adapter
from tuner.core.adapters.merging import Addition, merge_into, read_addition
from tuner.core.adapters.network import network_tensors
from tuner.core.errors import UsageError


def addition(path: Path, name: str, strength: float) -> Addition:
    _, network = build(name)
    randomize(network)
    save_adapter(network_tensors(network), MAPS.formats[1], path, {})
    return read_addition(path, strength, MAPS, where="model.merge[0]")


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("name", KINDS)
def test_the_merged_model_acts_as_the_adapted_one(tmp_path, name, strength):
    _, network = build(name)
    randomize(network)
    wanted = merged(network, toy_models(), strength)(toy_x())
    models = toy_models()
    assert merge_into(models.denoiser, "denoiser", [addition(tmp_path / "a.safetensors", name, strength)]) > 0
    torch.testing.assert_close(run(models), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run(models), run(toy_models()), atol=1e-3)


def test_several_adapters_are_rounded_once(tmp_path):
    models = toy_models()
    models.denoiser.to(torch.bfloat16)
    before = models.denoiser.blocks[0].q.weight.clone()
    some = [addition(tmp_path / "a.safetensors", "lora", 0.01), addition(tmp_path / "b.safetensors", "full", 0.01)]
    merge_into(models.denoiser, "denoiser", some)
    exact = toy_models()
    exact.denoiser.blocks[0].q.weight.data = before.float()
    merge_into(exact.denoiser, "denoiser", some)
    assert torch.equal(models.denoiser.blocks[0].q.weight, exact.denoiser.blocks[0].q.weight.to(torch.bfloat16))


def test_every_adapter_acts_on_the_weight_as_it_was(tmp_path):
    names = ("lora", "dora", "oft", "full")
    some = [addition(tmp_path / f"{name}.safetensors", name, 0.7) for name in names]

    def weight(additions):
        models = toy_models()
        merge_into(models.denoiser, "denoiser", additions)
        return models.denoiser.blocks[0].q.weight.detach()

    base = toy_models().denoiser.blocks[0].q.weight.detach()
    wanted = base + sum(weight([each]) - base for each in some)
    for order in (some, some[::-1]):
        torch.testing.assert_close(weight(order), wanted, rtol=0, atol=1e-5)


def test_a_module_that_is_not_there_is_named(tmp_path):
    found = addition(tmp_path / "a.safetensors", "lora", 1.0)
    models = toy_models()
    models.denoiser.blocks = models.denoiser.blocks[:1]
    with pytest.raises(UsageError, match=r"denoiser:blocks\.1\.q to merge into"):
        merge_into(models.denoiser, "denoiser", [found])
    assert merge_into(models.text_encoders["words"], "words", [found]) == 0
