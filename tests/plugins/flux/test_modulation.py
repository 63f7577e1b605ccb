"""Frozen modulations of the blocks: once per step, bit for bit what the blocks would compute themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.fixtures.runs import adapted, counted
from tests.plugins.flux.golden_models import golden_case, golden_denoiser, run
from tuner.core.compute.modulation_cache import cache_modulations
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.plugins.flux.denoiser import blocks_of

MODULATIONS = r".*\.(norm|norm1|norm1_context)\.linear"


@pytest.fixture
def prepared(opened):
    """(network section) -> the golden model, its adapter's parameters, its facts, and runs by modulation linear."""

    def make(**network: Any):
        config, facts = opened(network=network)
        denoiser = golden_denoiser()
        runs = counted(denoiser, MODULATIONS)
        return denoiser, adapted(denoiser, config, facts), facts, runs

    return make


def step(denoiser: nn.Module, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The output and the gradients of one step."""
    case, grid = golden_case("forward_0")
    out = run(denoiser, case, grid)
    return [out.detach(), *torch.autograd.grad(out.square().mean(), parameters)]


def prepare(denoiser: nn.Module, facts: Any, level: str) -> None:
    lists = [blocks.path for blocks in facts.block_lists]
    cache_modulations(denoiser, facts.modulation, lists)
    for path in lists:
        apply_checkpointing(denoiser.get_submodule(path).children(), level)


@pytest.mark.parametrize("level", ["off", "block"])
def test_each_runs_once_per_step_with_the_same_output_and_gradients(prepared, level):
    denoiser, parameters, facts, runs = prepared(rank=2, preset="all+ffs")
    for path in ("transformer_blocks", "single_transformer_blocks"):
        apply_checkpointing(denoiser.get_submodule(path).children(), level)
    plain = step(denoiser, parameters)
    assert set(runs.values()) == {1 if level == "off" else 2}
    assert len(runs) == 2 * len(denoiser.transformer_blocks) + len(denoiser.single_transformer_blocks)
    runs.clear()
    for path in ("transformer_blocks", "single_transformer_blocks"):
        apply_checkpointing(denoiser.get_submodule(path).children(), "off")
    prepare(denoiser, facts, level)
    assert all(map(torch.equal, step(denoiser, parameters), plain))
    assert set(runs.values()) == {1}
    assert len(runs) == 2 * len(denoiser.transformer_blocks) + len(denoiser.single_transformer_blocks)


def test_adapted_ones_train_as_before(prepared):
    denoiser, parameters, facts, _ = prepared(rank=2, preset="ai-toolkit")
    plain = step(denoiser, parameters)
    names = list(denoiser.state_dict())
    prepare(denoiser, facts, "block")
    assert all(map(torch.equal, step(denoiser, parameters), plain))
    assert list(denoiser.state_dict()) == names


def test_an_adapter_in_front_of_the_vector_gets_the_same_gradient(prepared):
    denoiser, parameters, facts, runs = prepared(rank=2, include=[r"time_text_embed\..*"], exclude=[r".*blocks.*"])
    plain = step(denoiser, parameters)
    assert len(parameters) == 12
    runs.clear()
    prepare(denoiser, facts, "block")
    for one, other in zip(step(denoiser, parameters), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert set(runs.values()) == {1}


def test_previews_between_forward_and_backward_change_nothing(prepared):
    denoiser, parameters, facts, _ = prepared(rank=2, preset="all+ffs")
    plain = step(denoiser, parameters)
    prepare(denoiser, facts, "block")
    case, grid = golden_case("forward_0")
    out = run(denoiser, case, grid)
    with torch.no_grad():
        run(denoiser, *golden_case("forward_1"))
    assert all(map(torch.equal, torch.autograd.grad(out.square().mean(), parameters), plain[1:]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at its inputs
def test_compiled_blocks_stay_one_graph_each(prepared):
    denoiser, parameters, facts, runs = prepared(rank=2, preset="all+ffs")
    plain = step(denoiser, parameters)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in blocks_of(denoiser):
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    prepare(denoiser, facts, "block")
    step(denoiser, parameters)
    graphs = counter.frame_count
    runs.clear()
    for one, other in zip(step(denoiser, parameters), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == graphs
    assert set(runs.values()) == {1}


def test_chroma_has_none_in_its_blocks(opened):
    _, facts = opened("chroma")
    assert facts.modulation == ()
