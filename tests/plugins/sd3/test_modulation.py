"""Frozen modulations of the blocks: once per step, bit for bit what the blocks would compute themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.fixtures.runs import adapted, counted
from tests.plugins.sd3.golden_models import golden_case
from tuner.core.compute.modulation_cache import cache_modulations
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.plugins.sd3.facts import facts

FLAVOURS = ("sd3m", "sd35m")


@pytest.fixture
def prepared(golden_model, tiny, run_config):
    """(flavour, network section) -> the golden model, its adapter's parameters, its facts, and runs by modulation."""

    def make(flavour: str, **network: Any):
        config = run_config(tiny(flavour), network={"rank": 2, **network})
        denoiser, found = golden_model(flavour), facts(config)
        runs = counted(denoiser, r".*\.norm1(_context)?\.linear")
        return denoiser, adapted(denoiser, config, found), found, runs

    return make


def step(denoiser: nn.Module, flavour: str, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The output and the gradients of one step."""
    case = golden_case(flavour, "forward_0")
    out = denoiser(case["x"], case["context"], case["y"], case["timesteps"])
    return [out.detach(), *torch.autograd.grad(out.square().mean(), parameters)]


@pytest.mark.parametrize("level", ["off", "block"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_each_runs_once_per_step_with_the_same_output_and_gradients(prepared, flavour, level):
    denoiser, parameters, found, runs = prepared(flavour, preset="attention")
    blocks = denoiser.transformer_blocks
    apply_checkpointing(blocks.children(), level)
    plain = step(denoiser, flavour, parameters)
    assert set(runs.values()) == {1 if level == "off" else 2}
    assert len(runs) == 2 * len(blocks)
    runs.clear()
    apply_checkpointing(blocks.children(), "off")
    cache_modulations(denoiser, found.modulation, ["transformer_blocks"])
    apply_checkpointing(blocks.children(), level)
    assert all(map(torch.equal, step(denoiser, flavour, parameters), plain))
    assert set(runs.values()) == {1}
    assert len(runs) == 2 * len(blocks)


@pytest.mark.parametrize("preset", [None, "embedders"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_adapters_on_them_or_in_front_of_them_train_as_before(prepared, flavour, preset):
    denoiser, parameters, found, _ = prepared(flavour, preset=preset)
    names = list(denoiser.state_dict())
    plain = step(denoiser, flavour, parameters)
    cache_modulations(denoiser, found.modulation, ["transformer_blocks"])
    apply_checkpointing(denoiser.transformer_blocks.children(), "block")
    for one, other in zip(step(denoiser, flavour, parameters), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert list(denoiser.state_dict()) == names


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at its inputs
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_compiled_blocks_stay_one_graph_each(prepared, flavour):
    denoiser, parameters, found, runs = prepared(flavour, preset="attention")
    plain = step(denoiser, flavour, parameters)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in denoiser.transformer_blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    cache_modulations(denoiser, found.modulation, ["transformer_blocks"])
    apply_checkpointing(denoiser.transformer_blocks.children(), "block")
    step(denoiser, flavour, parameters)
    graphs = counter.frame_count
    runs.clear()
    for one, other in zip(step(denoiser, flavour, parameters), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == graphs
    assert set(runs.values()) == {1}
