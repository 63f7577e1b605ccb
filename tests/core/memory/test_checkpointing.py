"""Recomputed blocks: the same gradients bit for bit, fewer saved activations, and no trace after removal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.trace import Counting
from tests.core.memory.toy import Model, batch, train
from tuner.core.errors import UsageError
from tuner.core.memory.checkpointing import LEVELS, apply_checkpointing


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 32), nn.Linear(32, 8)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.calls += 1
        out = x + self.narrow(self.dropout(torch.tanh(self.wide(x))))
        return out if bias is None else out + bias


def make(dropout: float = 0.0) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block(dropout) for _ in range(4))


def gradients(blocks: nn.ModuleList) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(3, 8)
    for block in blocks:
        x = block(x, bias=None)
    return list(torch.autograd.grad(x.square().mean(), list(blocks.parameters())))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("every", [1, 3])
def test_gradients_are_bit_equal_with_and_without_dropout(dropout: float, every: int) -> None:
    blocks = make(dropout)
    plain = gradients(blocks)
    apply_checkpointing(blocks, "block", every)
    assert all(map(torch.equal, plain, gradients(blocks)))


def test_every_nth_block_from_the_first_runs_twice() -> None:
    blocks = make()
    apply_checkpointing(blocks, "block", every=3)
    gradients(blocks)
    assert [block.calls for block in blocks] == [2, 1, 1, 2]


def test_without_gradients_a_block_runs_once() -> None:
    blocks = make()
    apply_checkpointing(blocks, "block")
    with torch.no_grad():
        blocks[0](torch.zeros(1, 8))
    assert blocks[0].calls == 1


def test_applying_twice_does_not_nest_and_off_removes() -> None:
    blocks = make()
    apply_checkpointing(blocks, "block")
    apply_checkpointing(blocks, "block")
    gradients(blocks)
    assert [block.calls for block in blocks] == [2, 2, 2, 2]
    apply_checkpointing(blocks, "off")
    assert all("forward" not in block.__dict__ for block in blocks)


def test_removal_gives_back_a_forward_that_was_replaced_before() -> None:
    blocks = make()
    seen: list[int] = []

    def streamed(x: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(1)
        return Block.forward(blocks[0], x, bias)

    blocks[0].forward = streamed
    handle = apply_checkpointing(blocks, "block")
    gradients(blocks)
    assert len(seen) == 2
    handle.remove()
    assert blocks[0].forward is streamed


def test_only_the_inputs_of_a_block_are_kept() -> None:
    blocks = make()

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            blocks[1](torch.randn(3, 8))
        return sum(sizes)

    assert kept() > 3 * 8
    apply_checkpointing(blocks, "block")
    assert kept() == 3 * 8


@pytest.mark.parametrize(
    ("level", "every", "where"), [("most", 1, "memory.checkpointing"), ("block", 0, "memory.checkpoint_every")]
)
def test_wrong_settings_are_errors_at_their_place(level: str, every: int, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        apply_checkpointing(make(), level, every)
    assert where in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS[1:])
def test_every_level_trains_to_the_same_bits(level: str, dtype: torch.dtype) -> None:
    results = []
    for each in ("off", level):
        model = Model(dtype)
        parameters = model.adapt()
        apply_checkpointing(model.blocks(), each)
        results.append(train(model, parameters, 5))
    assert all(map(torch.equal, *results))


def kept(level: str, tokens: int = 64) -> int:
    """Bytes that one block's forward pass leaves behind beside its result, in units of one activation."""
    model = Model()
    model.adapt()
    block = model.pairs[0]
    apply_checkpointing([block], level)
    x, condition = (each.requires_grad_() for each in batch(0, tokens))
    with Counting() as counting:
        result = block(x, condition)
    unit = result.numel() * result.element_size()
    return round((counting.alive() - unit) / unit)


def test_levels_keep_what_they_say() -> None:
    # q, k and v; attention; its projection; the two products of the MLP, of which the first is 4 wide.
    assert kept("block") == 0
    assert kept("keep_attention") == 1
    assert kept("selective") == 3 + 1 + 1 + 4 + 1
    assert kept("off") > kept("selective")


@pytest.mark.parametrize(
    ("level", "attention", "products"), [("block", 2, 2), ("keep_attention", 1, 2), ("selective", 1, 1)]
)
def test_what_is_kept_does_not_run_again(level: str, attention: int, products: int) -> None:
    model = Model()
    parameters = model.adapt(("q",))
    block = model.pairs[0]
    apply_checkpointing([block], level)
    with Counting() as forward:
        result = block(*(each.requires_grad_() for each in batch(0)))
    with Counting() as backward:
        torch.autograd.grad(result.sum(), parameters[:2])
    first, second = forward.traffic.counts, backward.traffic.counts
    assert second["_scaled_dot_product_flash_attention_for_cpu"] == attention - 1
    # The last product of a block is needed by nothing inside it.
    assert second["addmm"] == (products - 1) * (first["addmm"] - 1)
