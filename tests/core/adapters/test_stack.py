"""Adapters of files on a model: as in their training, in any number, at any strength, and gone without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.core.adapters.test_kinds import KINDS, build, randomize
from tests.core.adapters.toy import FACTS, toy_config, toy_models, toy_x
from tuner.core.adapters.lora import inject_lora
from tuner.core.adapters.network import adapter_strength, network_tensors
from tuner.core.adapters.stack import AdapterStack
from tuner.core.compute.quantized import quantize_linear
from tuner.core.errors import UsageError
from tuner.core.types import Models


def trained(name: str, seed: int = 4, **more: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a trained adapter, and what its model then gives."""
    models, network = build(name, **more)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    network.module.eval()
    assert models.denoiser is not None
    with torch.no_grad():
        return {key: value.clone() for key, value in network_tensors(network).items()}, models.denoiser(toy_x())


def stack_of(models: Models, *adapters: dict[str, Tensor]) -> AdapterStack:
    stack = AdapterStack()
    for number, tensors in enumerate(adapters):
        stack.add(tensors, models, FACTS, dtype=torch.float32, where=f"adapter {number}")
    return stack


@torch.no_grad()
def output(models: Models) -> Tensor:
    assert models.denoiser is not None
    result: Tensor = models.denoiser(toy_x())
    return result


@pytest.mark.parametrize("name", KINDS)
def test_a_file_acts_as_the_adapter_did_when_it_was_trained(name: str) -> None:
    tensors, expected = trained(name)
    models = toy_models()
    base = output(models)
    stack = stack_of(models, tensors)
    with stack.acting():
        assert torch.equal(output(models), expected)
        stack.set_strengths([0.0])
        assert torch.equal(output(models), base)
        stack.set_strengths([1.0])
        assert torch.equal(output(models), expected)
    assert torch.equal(output(models), base)
    assert not torch.equal(expected, base)


@pytest.mark.parametrize("name", KINDS)
def test_the_changes_of_several_adapters_add_up_in_any_order(name: str) -> None:
    """Of one linear, where the sum can be seen."""
    first, second = ({key: value for key, value in trained(kind, seed)[0].items() if ":blocks.0.mlp.2." in key}
                     for kind, seed in ((name, 1), ("lora", 2)))  # fmt: skip
    assert first and second
    x, outputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3)), []
    for adapters in ((), (first,), (second,), (first, second), (second, first)):
        models = toy_models()
        assert models.denoiser is not None
        linear: Any = models.denoiser.blocks[0].mlp[2]
        stack = stack_of(models, *adapters)
        stack.set_strengths([0.5] * len(adapters))
        with stack.acting(), torch.no_grad():
            outputs.append(linear(x))
    base, one, other, both, reverse = outputs
    torch.testing.assert_close(both, one + other - base)
    torch.testing.assert_close(reverse, both)


def test_norms_and_convolutions_add_up_too() -> None:
    first, _ = trained("full with norms", 1)
    second, _ = trained("full with norms", 2)
    lora, _ = trained("lora", 3, include=["embed"])
    models = toy_models()
    stack = stack_of(models, first, second, lora)
    assert models.denoiser is not None
    norm: Any = models.denoiser.blocks[0].norm
    own = norm._parameters["weight"].clone()
    with stack.acting():
        stack.set_strengths([1.0, 2.0, 1.0])
        name = "denoiser:blocks.0.norm.w_norm"
        torch.testing.assert_close(norm.weight, own + first[name] + 2 * second[name])
        everything = output(models)
        stack.set_strengths([1.0, 2.0, 0.0])
        assert not torch.equal(output(models), everything)
    assert torch.equal(norm.weight, own)


def test_an_adapter_that_trains_takes_part_and_is_left_as_it_was() -> None:
    tensors, _ = trained("lora", 1)
    models, network = build("lora")
    randomize(network)
    network.module.eval()
    alone = output(models)
    stack = stack_of(models, tensors)
    with adapter_strength(network, 0.0), stack.acting():
        only_file = output(models)
    with stack.acting():
        both = output(models)
    assert torch.equal(output(models), alone)
    plain = toy_models()
    with stack_of(plain, tensors).acting():
        assert torch.equal(output(plain), only_file)
    own = {key: value.clone() for key, value in network_tensors(network).items()}
    plain = toy_models()
    with stack_of(plain, own, tensors).acting():
        assert torch.equal(output(plain), both)


def test_quantized_layers_take_adapters_too() -> None:
    tensors, _ = trained("lora")
    models = toy_models()
    assert models.denoiser is not None
    wider: Any = models.denoiser.blocks[0].mlp[2]
    quantize_linear(wider, "int8")
    network = inject_lora(other := copy.deepcopy(models), toy_config({"rank": 2, "alpha": 3.0}), FACTS)
    network.module.load(tensors)  # type: ignore[operator]
    network.module.eval()
    with stack_of(models, tensors).acting():
        assert torch.equal(output(models), output(other))


def test_an_adapter_of_another_model_is_refused_with_what_is_missing() -> None:
    tensors, _ = trained("lora")
    models = toy_models()
    moved = {key.replace("blocks.0", "blocks.9"): value for key, value in tensors.items()}
    with pytest.raises(UsageError, match=r"the model has no layer for denoiser:blocks\.9\.") as caught:
        stack_of(models, moved)
    assert "adapter 0" in str(caught.value)
    with pytest.raises(UsageError, match="fits no layer"):
        stack_of(models, {key.replace(":", ":other."): value for key, value in tensors.items()})
    wide = {key: torch.cat([value, value], 1) if key.endswith("down") else value for key, value in tensors.items()}
    with pytest.raises(UsageError, match="the model wants"):
        stack_of(models, wide)


def test_components_that_are_not_loaded_are_passed_over() -> None:
    tensors, _ = trained("lora")
    models = toy_models()
    words = {f"words:{key.partition(':')[2]}": value for key, value in tensors.items()}
    stack = stack_of(Models(denoiser=models.denoiser), {**tensors, **words})
    assert isinstance(stack.adapters[0], nn.ModuleList)
    assert len(stack.adapters[0]) == len({key.rpartition(".")[0] for key in tensors})
