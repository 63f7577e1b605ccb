"""Streamed blocks: the same bits as resident ones, loads that are asked for ahead, and weights that never go back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.memory.toy import LateLoads, Model, batch, train
from tuner.core.errors import UsageError
from tuner.core.memory import streaming
from tuner.core.memory.checkpointing import LEVELS, apply_checkpointing
from tuner.core.memory.streaming import SLOTS, Streaming, stream_blocks, stream_limit
from tuner.core.types import Blocks

CPU = torch.device("cpu")


def streamed(model: Model, count: int) -> Streaming:
    return stream_blocks(model, Model.LISTS, count, CPU)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("count", [2, 7])
def test_twenty_steps_give_the_same_bits(dtype: torch.dtype, level: str, count: int) -> None:
    results = []
    for stream in (False, True):
        model = Model(dtype)
        parameters = model.adapt()
        if stream:
            streamed(model, count)
        apply_checkpointing(model.blocks(), level if stream else "off", every=2 if count == 2 else 1)
        results.append(train(model, parameters, 20))
    assert equal(*results)


def test_a_weight_that_changed_under_autograd_would_be_noticed() -> None:
    # Without remembering places, backward would read what came into the slot later; torch sees that by itself.
    model = Model()
    parameters = model.adapt()
    for block in streamed(model, 7).blocks:
        block.forward.recomputed = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(model, parameters, 1)


@pytest.mark.parametrize("level", ["off", "block"])
@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_each_pass_loads_what_is_not_there_and_only_the_first_load_is_late(level: str, count: int) -> None:
    model = Model()
    parameters = model.adapt()
    streaming = streamed(model, count)
    apply_checkpointing(model.blocks(), level)
    slots = len(streaming.slots)
    assert slots == min(SLOTS, count - 1)
    train(model, parameters, 5)
    # A step goes there and back; the blocks at both turns are still in their slots.
    assert streaming.loads == slots + 5 * 2 * (count - slots)
    assert streaming.late == (1 if slots > 1 else streaming.loads)


@pytest.mark.parametrize("level", ["off", "block"])
def test_every_use_waits_for_its_load(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "open_transfers", LateLoads)
    results = []
    for stream in (False, True):
        model = Model()
        parameters = model.adapt()
        if stream:
            streamed(model, 7)
        apply_checkpointing(model.blocks(), level)
        results.append(train(model, parameters, 3, between=lambda _, model=model: model(*batch(50))))
    assert equal(*results)


def test_passes_without_gradients_follow_each_other_without_late_loads() -> None:
    model = Model()
    streaming = streamed(model, 6)
    with torch.inference_mode():
        for step in range(4):
            model(*batch(step))
    assert streaming.late == 1
    assert len(model.blocks()) > streaming.loads / 4


def test_frozen_weights_are_never_copied_to_the_host_nor_changed() -> None:
    model = Model()
    parameters = model.adapt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    streaming = streamed(model, 6)
    moved, versions = streaming.transfers.to_host, [flat._version for flat in streaming.host]
    assert moved > 0
    apply_checkpointing(model.blocks(), "block")
    train(model, parameters, 3)
    assert streaming.transfers.to_host == moved
    assert [flat._version for flat in streaming.host] == versions
    assert streaming.transfers.to_device > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("level", ["off", "block", "selective"])
def test_validation_previews_and_extra_passes_between_do_not_disturb(level: str) -> None:
    def looks(model: Model) -> None:
        with torch.no_grad():
            model(*batch(100))
        with torch.inference_mode():
            model(*batch(101, tokens=20))

    def run(stream: bool) -> list[Tensor]:
        model = Model()
        parameters = model.adapt()
        if stream:
            streamed(model, 6)
        apply_checkpointing(model.blocks(), level if stream else "off")
        model.head.register_forward_hook(lambda *_: looks_inside(model))
        return train(model, parameters, 4, between=lambda step: looks(model))

    def looks_inside(model: Model) -> None:
        # Guidance's second prediction: between the forward pass with gradients and its backward pass.
        if torch.is_grad_enabled():
            looks(model)

    assert equal(run(False), run(True))


def test_two_passes_with_gradients_before_one_backward() -> None:
    results = []
    for stream in (False, True):
        model = Model()
        parameters = model.adapt()
        if stream:
            streamed(model, 6)
        (model(*batch(0)) - model(*batch(1))).square().mean().backward()
        results.append([p.grad for p in parameters])
    assert equal(*results)


def test_gradients_that_stop_half_way_back() -> None:
    results = []
    for stream in (False, True):
        model = Model()
        parameters = model.adapt()
        for parameter in parameters[: len(parameters) // 2]:
            parameter.requires_grad_(False)
        if stream:
            streamed(model, 6)
        apply_checkpointing(model.blocks(), "block" if stream else "off", every=2)
        results.append(train(model, parameters[len(parameters) // 2 :], 3))
    assert equal(*results)


def test_adapters_and_what_is_used_outside_of_a_block_stay() -> None:
    model = Model()
    parameters = model.adapt()
    places = [parameter.data_ptr() for parameter in parameters]
    streaming = streamed(model, 7)
    train(model, parameters, 1)
    assert [parameter.data_ptr() for parameter in parameters] == places
    moving = {each.untyped_storage().data_ptr() for each in (*streaming.host, *(slot.flat for slot in streaming.slots))}
    for name, value in model.named_parameters():
        inside = value.untyped_storage().data_ptr() in moving
        assert not (inside and (".shift." in name or "head" in name))
    # Still one product for the shifts of all blocks.
    assert model.blocks()[0].shift.__dict__["storage_group"].weight is not None
    assert model.blocks()[0].q.__dict__["storage_group"].weight is not None


def test_streamed_blocks_are_spread_evenly_over_all_lists() -> None:
    model = Model()
    streaming = streamed(model, 4)
    blocks = model.blocks()
    assert [blocks.index(block) for block in streaming.blocks] == [1, 3, 5, 7]


def test_removal_gives_blocks_their_forward_and_values_back() -> None:
    model = Model()
    parameters = model.adapt()
    plain = train(model, parameters, 1)
    model = Model()
    parameters = model.adapt()
    streaming = streamed(model, 5)
    model(*batch(0))
    streaming.remove()
    assert all("forward" not in block.__dict__ for block in model.blocks())
    assert equal(plain, train(model, parameters, 1))


class Halved(torch.Tensor):
    """A frozen matrix stored as two halves of it, as quantized weights are stored in several tensors."""

    first: Tensor
    second: Tensor

    @staticmethod
    def __new__(cls, first: Tensor, second: Tensor, size: torch.Size) -> Halved:
        made = torch.Tensor._make_wrapper_subclass(cls, size, dtype=first.dtype, device=first.device)
        made.first, made.second = first, second
        return made

    def __tensor_flatten__(self) -> tuple[list[str], torch.Size]:
        return ["first", "second"], self.size()

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: torch.Size, size: Any, stride: Any) -> Halved:
        return Halved(inner["first"], inner["second"], context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            return torch.cat((value.first, value.second)) if isinstance(value, Halved) else value

        if func is torch.ops.aten.detach.default:
            return Halved(args[0].first, args[0].second, args[0].size())
        return func(*map(plain, args), **(kwargs or {}))


@pytest.mark.parametrize("level", ["off", "block"])
def test_weights_of_several_tensors_are_streamed_part_by_part(level: str) -> None:
    results = []
    for stream in (False, True):
        model = Model()
        for block in model.blocks():
            first, second = (half.clone() for half in block.wide.weight.data.chunk(2))
            weight = Halved(first, second, block.wide.weight.shape)
            block.wide.weight = torch.nn.Parameter(weight, requires_grad=False)
        parameters = model.adapt(("q",))
        if stream:
            streaming = streamed(model, 7)
            shapes = [piece.size for piece in streaming.layouts[0].pieces]
            assert shapes.count(torch.Size((128, 64))) == 2
        apply_checkpointing(model.blocks(), level)
        results.append(train(model, parameters, 3))
    assert equal(*results)


@pytest.mark.parametrize("count", [1, 8])
def test_a_count_outside_the_limits_is_refused_with_them(count: int) -> None:
    assert stream_limit(Model.LISTS) == 7
    with pytest.raises(UsageError, match="this model can stream 2 to 7"):
        streamed(Model(), count)


def test_limits_count_all_lists() -> None:
    assert stream_limit((Blocks(path="a", count=19), Blocks(path="b", count=38))) == 55
