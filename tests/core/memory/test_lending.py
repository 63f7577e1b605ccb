"""Streamed blocks whose weights train: parameters stay where they are, and train to the same bits as resident ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.core.memory.toy import LateLoads, Model, batch, train
from tuner.core.config import OptimizerConfig
from tuner.core.memory import streaming
from tuner.core.memory.checkpointing import LEVELS, apply_checkpointing
from tuner.core.memory.compiling import CompileSettings, compile_blocks
from tuner.core.memory.streaming import SLOTS, Streaming, stream_blocks
from tuner.core.memory.transfers import Transfers
from tuner.core.optim import FusedUpdate, Update, build_optimizer
from tuner.core.types import ParamGroup

CPU = torch.device("cpu")


def trainable(model: Model, kind: str) -> list[nn.Parameter]:
    """all: everything. biases: nothing else. mixed: matrices of every second block, and the ends."""
    for number, block in enumerate(model.blocks()):
        for name, value in block.named_parameters():
            value.requires_grad_(kind == "all" or (name.endswith("bias") if kind == "biases" else number % 2 == 0))
    if kind != "biases":
        for end in (model.embed, model.head):
            end.requires_grad_(True)
    return [value for value in model.parameters() if value.requires_grad]


def streamed(model: Model, count: int = 7) -> Streaming:
    return stream_blocks(model, Model.LISTS, count, CPU)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def both(kind: str, run: Callable[[Model, list[nn.Parameter], bool], list[Tensor]]) -> bool:
    """Whether ``run`` gives the same with resident and with streamed blocks."""
    results = []
    for stream in (False, True):
        model = Model()
        results.append(run(model, trainable(model, kind), stream))
    return equal(*results)


@pytest.mark.parametrize(
    ("kind", "level", "count"),
    [*(("all", level, 7) for level in LEVELS), *(("mixed", level, 2) for level in LEVELS), ("biases", "off", 7)],
)
def test_they_train_to_the_same_bits(kind: str, level: str, count: int) -> None:
    def run(model: Model, parameters: list[nn.Parameter], stream: bool) -> list[Tensor]:
        if stream:
            streamed(model, count)
        apply_checkpointing(model.blocks(), level if stream else "off", every=2 if count == 2 else 1)
        return train(model, parameters, 5)

    assert both(kind, run)


class LateCopies(LateLoads):
    """Both directions as late as a device may make them."""

    def fetch(self, values: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Callable[[], None]]:
        copies, _ = super().fetch(values)
        true = [None if each is None else each.clone() for each in copies]
        for each in copies:
            if each is not None:
                each.fill_(torch.nan)

        def wait() -> None:
            for copy, value in zip(copies, true, strict=True):
                if copy is not None and value is not None:
                    copy.copy_(value)

        return copies, wait


@pytest.mark.parametrize("level", ["off", "block"])
def test_every_use_waits_for_its_copy(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "open_transfers", LateCopies)

    def run(model: Model, parameters: list[nn.Parameter], stream: bool) -> list[Tensor]:
        if stream:
            streamed(model)
        apply_checkpointing(model.blocks(), level)
        return train(model, parameters, 3, between=lambda _: model(*batch(50)))

    assert both("mixed", run)


def test_passes_between_see_the_weights_of_that_moment() -> None:
    def run(model: Model, parameters: list[nn.Parameter], stream: bool) -> list[Tensor]:
        if stream:
            streamed(model, 6)
        seen: list[Tensor] = []

        def look(_: int) -> None:
            kept = [parameter.detach().clone() for parameter in parameters]
            with torch.no_grad():
                seen.append(model(*batch(100)))
                for parameter in parameters:
                    parameter.mul_(0.5)
                seen.append(model(*batch(100)))
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
            with torch.inference_mode():
                seen.append(model(*batch(101, tokens=20)).clone())

        return train(model, parameters, 3, between=look) + seen

    assert both("all", run)


def test_a_pass_that_failed_leaves_no_old_copies() -> None:
    def run(model: Model, parameters: list[nn.Parameter], stream: bool) -> list[Tensor]:
        if stream:
            streamed(model)

        def fail(_: int) -> None:
            hook = model.singles[0].narrow.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError))
            with pytest.raises(OSError), torch.no_grad():
                model(*batch(0))
            hook.remove()
            with torch.no_grad():
                for parameter in parameters:
                    parameter.mul_(0.9)

        return train(model, parameters, 2, between=fail)

    assert both("all", run)


def test_several_passes_and_several_backward_passes_add_up() -> None:
    def run(model: Model, parameters: list[nn.Parameter], stream: bool) -> list[Tensor]:
        if stream:
            streamed(model, 6)
        apply_checkpointing(model.blocks(), "block" if stream else "off", every=2)
        for step in (0, 2):
            (model(*batch(step)) - model(*batch(step + 1))).square().mean().backward()
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    assert both("all", run)


def test_weights_that_stop_training_get_no_gradient_any_more() -> None:
    results = []
    for stream in (False, True):
        model = Model()
        parameters = trainable(model, "mixed")
        if stream:
            streamed(model)
        first = parameters[: len(parameters) // 2]
        results.append(train(model, parameters, 1))
        for parameter in first:
            parameter.requires_grad_(False)
            parameter.grad = None
        results[-1] += train(model, parameters[len(parameters) // 2 :], 2)
        assert all(parameter.grad is None for parameter in first)
    # Resident ones that are frozen by then are multiplied together.
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_parameters_stay_where_they_are_and_nothing_but_gradients_goes_back() -> None:
    model = Model()
    parameters = trainable(model, "mixed")
    streaming = streamed(model)
    places = {name: (id(value), value.data_ptr()) for name, value in model.named_parameters() if value.requires_grad}
    moved = streaming.transfers.to_host
    inside = {id(value) for layout in streaming.layouts for value in layout.trained}
    assert inside
    size = sum(value.numel() * value.element_size() for value in parameters if id(value) in inside)
    train(model, parameters, 3, between=lambda _: None)
    assert streaming.transfers.to_host == moved + 3 * size
    now = {name: (id(value), value.data_ptr()) for name, value in model.named_parameters() if value.requires_grad}
    assert now == places
    assert all(value.grad is not None for value in parameters)


def test_copies_are_loaded_once_for_both_passes() -> None:
    model = Model()
    parameters = trainable(model, "all")
    streaming = streamed(model)
    train(model, parameters, 4)
    # Only the turn inside a step finds blocks in their slots; each step begins anew.
    assert streaming.loads == 4 * (2 * 7 - SLOTS)
    assert streaming.late == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at its inputs
def test_compiled_blocks_get_the_same_gradients() -> None:
    results = []
    for compiled in (False, True):
        model = Model()
        parameters = trainable(model, "all")
        if compiled:
            compile_blocks(model, Model.LISTS, CompileSettings(backend="aot_eager"))
            streamed(model)
        apply_checkpointing(model.blocks(), "block")
        results.append(train(model, parameters, 1))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("passes", "kind", "level"), [(1, "mixed", "off"), (1, "all", "block"), (2, "mixed", "off")])
def test_updates_inside_the_backward_pass_change_copies_that_go_back(passes: int, kind: str, level: str) -> None:
    """Of several passes none has whole gradients, so these go to host memory."""
    moved: list[int] = []

    def run(model: Model, parameters: list[nn.Parameter], stream: bool) -> list[Tensor]:
        names = {name: value for name, value in model.named_parameters() if value.requires_grad}
        config = OptimizerConfig(name="lion", lr=1e-3, fuse="block")
        optimizer = build_optimizer(config, [ParamGroup(name="all", component="denoiser", params=names)], CPU)
        fused = FusedUpdate(Update(config, optimizer, names, 0), [], clip_value=1e-2)
        if stream:
            streaming = streamed(model)
            streaming.update_in_slots(fused.take)
            fused.finish = streaming.finish
            streaming.transfers.fetch = lambda values: moved.append(1) or Transfers.fetch(streaming.transfers, values)  # type: ignore[func-returns-value,method-assign]
        apply_checkpointing(model.blocks(), level)
        for step in range(3):
            loss = sum(model(*batch(2 * step + number)).square().mean() for number in range(passes))
            with fused.during(step + 1):
                loss.backward()  # type: ignore[union-attr]
        assert all(parameter.grad is None for parameter in parameters)
        return [fused.norm(), *(parameter.detach() for parameter in parameters)]

    assert both(kind, run)
    assert bool(moved) == (passes > 1)
