"""Linears that read one vector per sample: once per forward, the same values everywhere, and no trace afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.fixtures.runs import counted
from tuner.core.adapters.layers import Dropout, DropoutKeys, LoraLayer, eject, inject
from tuner.core.compute.modulation_cache import cache_modulations, modulations
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.rng import Rng

PATTERNS = (r"blocks\.\d+\.norm\.linear",)
WIDTH = 6


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.linear(torch.tanh(condition))[:, None].chunk(2, dim=-1)
        return torch.sin(x) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = Norm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(self.norm(x, condition)))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        with modulations(self, torch.tanh(condition)):
            for block in self.blocks:
                x = block(x, condition)
        return x


@pytest.fixture
def denoiser() -> Denoiser:
    """The modulations are frozen, the rest trains."""
    torch.manual_seed(0)
    model = Denoiser()
    for block in model.blocks:
        block.norm.requires_grad_(False)
    return model


def inputs(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator)


def gradients(model: nn.Module, seed: int = 1) -> list[Tensor]:
    model.zero_grad()
    model(*inputs(seed)).square().mean().backward()
    return [each.grad.clone() for each in model.parameters() if each.grad is not None]


def adapter(linear: nn.Linear) -> LoraLayer:
    layer = LoraLayer(
        linear, rank=2, alpha=2.0, dropout=Dropout(), keys=DropoutKeys(), dtype=torch.float32, rng=Rng(0, "test")
    )
    nn.init.normal_(layer.up)
    return layer


@pytest.mark.parametrize("level", ["off", "block"])
def test_outputs_and_gradients_are_bit_equal(denoiser, level):
    before, out = gradients(denoiser), denoiser(*inputs())
    assert cache_modulations(denoiser, PATTERNS, ["blocks"]) is not None
    apply_checkpointing(denoiser.blocks, level)
    assert torch.equal(denoiser(*inputs()), out)
    assert all(map(torch.equal, gradients(denoiser), before))


def test_each_runs_once_although_the_blocks_run_twice(denoiser):
    runs = counted(denoiser, *PATTERNS)
    apply_checkpointing(denoiser.blocks, "block")
    gradients(denoiser)
    assert set(runs.values()) == {2}
    apply_checkpointing(denoiser.blocks, "off")
    runs.clear()
    cache_modulations(denoiser, PATTERNS, ["blocks"])
    apply_checkpointing(denoiser.blocks, "block")
    gradients(denoiser)
    assert runs == dict.fromkeys(runs, 1)
    assert len(runs) == len(denoiser.blocks)


def test_a_gradient_that_reaches_the_vector_is_the_same(denoiser):
    x, condition = inputs()
    found = []
    for _ in range(2):
        leaf = condition.clone().requires_grad_()
        denoiser(x, leaf).square().mean().backward()
        found.append(leaf.grad)
        cache_modulations(denoiser, PATTERNS, ["blocks"])
        apply_checkpointing(denoiser.blocks, "block")
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def test_recomputation_sees_its_own_forward_after_others_ran(denoiser):
    wanted = [gradients(denoiser, seed) for seed in (1, 2)]
    cache_modulations(denoiser, PATTERNS, ["blocks"])
    apply_checkpointing(denoiser.blocks, "block")
    first, second = (denoiser(*inputs(seed)).square().mean() for seed in (1, 2))
    with torch.no_grad():
        denoiser(*inputs(3))
    for loss, gradient in ((first, wanted[0]), (second, wanted[1])):
        denoiser.zero_grad()
        loss.backward()
        assert all(map(torch.equal, (p.grad for p in denoiser.parameters() if p.grad is not None), gradient))


def test_nothing_is_left_after_a_forward_or_an_error(denoiser):
    cache = cache_modulations(denoiser, PATTERNS, ["blocks"])
    apply_checkpointing(denoiser.blocks, "block")

    def assert_empty() -> None:
        assert cache.rows is None
        assert all(block.norm.linear.modulation_row is None for block in denoiser.blocks)

    gradients(denoiser)
    assert_empty()
    with pytest.raises(RuntimeError):
        denoiser(torch.randn(2, 5, WIDTH + 1), inputs()[1])
    assert_empty()
    # Outside the denoiser's forward a block computes from what it is given.
    x, condition = inputs()
    plain = Block.forward(denoiser.blocks[0], x, condition)
    assert torch.equal(denoiser.blocks[0](x, condition), plain)


@pytest.mark.parametrize("late", [False, True])
def test_adapted_and_trainable_ones_compute_as_usual(denoiser, late):
    runs = counted(denoiser, *PATTERNS)
    trained, adapted = denoiser.blocks[0].norm.linear, denoiser.blocks[1].norm.linear
    layer = adapter(adapted)
    if late:
        cache_modulations(denoiser, PATTERNS, ["blocks"])
    trained.requires_grad_(True)
    record = inject(adapted, layer)
    if not late:
        wanted = denoiser(*inputs())
        cache_modulations(denoiser, PATTERNS, ["blocks"])
        assert torch.equal(denoiser(*inputs()), wanted)
    runs.clear()
    apply_checkpointing(denoiser.blocks, "block")
    gradients(denoiser)
    assert runs["blocks.0.norm.linear"] == 2
    assert runs["blocks.2.norm.linear"] == 1
    assert trained.weight.grad is not None
    assert layer.up.grad is not None
    eject(record)
    adapted(torch.zeros(1, WIDTH))


def test_names_and_state_dict_stay_and_removal_leaves_no_trace(denoiser):
    names = [list(denoiser.state_dict()), [name for name, _ in denoiser.named_modules()]]
    attributes = [set(module.__dict__) for module in denoiser.modules()]
    cache = cache_modulations(denoiser, PATTERNS, ["blocks"])
    assert [list(denoiser.state_dict()), [name for name, _ in denoiser.named_modules()]] == names
    cache.remove()
    assert [set(module.__dict__) for module in denoiser.modules()] == attributes


def test_without_matches_nothing_is_replaced(denoiser):
    attributes = [set(module.__dict__) for module in denoiser.modules()]
    assert cache_modulations(denoiser, (), ["blocks"]) is None
    assert cache_modulations(denoiser, (r"norm\.linear",), ["blocks"]) is None
    assert [set(module.__dict__) for module in denoiser.modules()] == attributes


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at its inputs
@pytest.mark.parametrize("level", ["off", "block"])
def test_compiled_blocks_share_their_graphs_over_forwards(denoiser, level):
    wanted = gradients(denoiser)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in denoiser.blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    cache_modulations(denoiser, PATTERNS, ["blocks"])
    apply_checkpointing(denoiser.blocks, level)
    for seed in (2, 3, 1):
        found = gradients(denoiser, seed)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    # The first block's input needs no gradient, the others' does.
    assert counter.frame_count == 2
