"""Ways to apply an optimizer: rounding, host memory, and updates inside the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tuner.core.config import OptimizerConfig
from tuner.core.errors import UsageError
from tuner.core.optim import (
    FusedUpdate,
    Update,
    add_up_in_float32,
    build_optimizer,
    is_separate,
    optimizer_state_tensors,
)
from tuner.core.optim.names import BUILTIN, Entry
from tuner.core.types import ParamGroup


class Counting(torch.optim.Optimizer):
    """Counts updates by group, as some packages do, and keeps one of its averages in a list."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not any(parameter.grad is not None for parameter in group["params"]):
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["parts"] = [torch.zeros_like(parameter), 0]
                    state["parts"][0].lerp_(parameter.grad, 0.1)
                    state["parts"][1] += 1
                    parameter.sub_(state["parts"][0], alpha=group["lr"] / (1 - 0.9 ** group["step"]))


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(module=__name__, attribute="Counting", separate=True, counts=True)
    monkeypatch.setitem(BUILTIN, "counting", entry)  # type: ignore[arg-type]


class Rig:
    """Three linears with names; ``steps`` trains them on fixed data."""

    def __init__(self, dtype: torch.dtype = torch.float32, **keys: Any) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).to(dtype)
        self.names = dict(self.model.named_parameters())
        self.config = OptimizerConfig(**({"name": "adamw", "lr": 1e-2} | keys))
        matrices = {name: value for name, value in self.names.items() if value.ndim == 2}
        rest = {name: value for name, value in self.names.items() if value.ndim == 1}
        groups = [ParamGroup(name=name, component="denoiser", params=params)
                  for name, params in (("matrices", matrices), ("rest", rest))]  # fmt: skip
        self.optimizer = build_optimizer(self.config, groups, "cpu")
        self.update = Update(self.config, self.optimizer, self.names, seed=5)

    def loss(self, step: int) -> torch.Tensor:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).to(next(iter(self.names.values())).dtype)
        return (self.model(x).float() - 1).square().mean()

    def steps(self, count: int, first: int = 1) -> dict[str, torch.Tensor]:
        for step in range(first, first + count):
            self.optimizer.zero_grad()
            self.loss(step).backward()
            self.update(step)
        return self.weights()

    def fused(self, count: int, units: list[list[nn.Parameter]], **keys: Any) -> dict[str, torch.Tensor]:
        fused = FusedUpdate(self.update, units, **keys)
        for step in range(1, count + 1):
            with fused.during(step):
                self.loss(step).backward()
            assert all(parameter.grad is None for parameter in self.names.values())
        fused.remove()
        return self.weights()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.names.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SEPARATE = ["adamw", "adamw_bf16", "adafactor", "lion", "muon", "radam", "adam", "adagrad", "sgd_nesterov", "counting"]


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.parametrize("unit", ["parameter", "block"])
def test_updates_inside_the_backward_pass_give_the_same_bits(name: str, unit: str) -> None:
    plain, rig = Rig(name=name, args={"fused": False} if name == "adamw" else {}), None
    rig = Rig(name=name, args={"fused": False} if name == "adamw" else {}, fuse=unit)
    units = [list(layer.parameters()) for layer in rig.model] if unit == "block" else []
    assert same(rig.fused(4, units), plain.steps(4))
    one, other = (optimizer_state_tensors(each.optimizer, each.names) for each in (rig, plain))
    assert same(one[0], other[0]) and one[1] == other[1]


def test_gradients_of_one_block_at_most_are_alive_at_once() -> None:
    rig, alive = Rig(fuse="block"), []
    original = rig.update.apply

    def counted(parameters: Any, step: int) -> None:
        alive.append(sum(parameter.grad is not None for parameter in rig.names.values()))
        original(parameters, step)

    rig.update.apply = counted  # type: ignore[method-assign]
    rig.fused(2, [list(layer.parameters()) for layer in rig.model])
    assert alive == [2] * 6


def test_gradients_are_limited_by_value_and_their_norm_is_known() -> None:
    plain, rig = Rig(), Rig(fuse="parameter")
    plain.loss(1).backward()
    expected = torch.nn.utils.get_total_norm([each.grad for each in plain.names.values()])
    torch.nn.utils.clip_grad_value_(plain.names.values(), 1e-3)
    plain.update(1)
    fused = FusedUpdate(rig.update, [], clip_value=1e-3)
    with fused.during(1):
        rig.loss(1).backward()
    torch.testing.assert_close(fused.norm(), expected)
    assert same(rig.weights(), plain.weights())


def test_a_block_that_is_reached_in_part_is_updated_in_part() -> None:
    rig = Rig(fuse="block")
    before = rig.weights()
    fused = FusedUpdate(rig.update, [list(rig.names.values())])
    with fused.during(1):
        rig.model[0](torch.ones(1, 8)).sum().backward()
    moved = {name for name, value in rig.weights().items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "0.bias"}


def test_outside_of_an_update_gradients_are_left_alone() -> None:
    rig = Rig(fuse="parameter")
    FusedUpdate(rig.update, [])
    before = rig.weights()
    rig.loss(1).backward()
    assert same(rig.weights(), before) and rig.names["0.weight"].grad is not None


def test_small_changes_reach_bfloat16_weights_when_they_are_rounded_well() -> None:
    """The mean of the weights after 100 updates of 1/2000 each, which are below half a unit in the last place."""
    moved = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        config = OptimizerConfig(name="sgd", lr=1.0, rounding=rounding)
        group = ParamGroup(name="all", component="denoiser", params={"p": parameter})
        optimizer = build_optimizer(config, [group], "cpu")
        update = Update(config, optimizer, {"p": parameter}, seed=0)
        for step in range(100):
            parameter.grad = torch.full_like(parameter, 1 / 2048)
            update(step + 1)
        moved[rounding] = 1 - float(parameter.detach().float().mean())
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(100 / 2048, rel=0.05)
    assert moved["kahan"] == pytest.approx(100 / 2048, rel=0.05)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", SEPARATE)
def test_rounded_updates_go_on_exactly_and_do_not_depend_on_chunks(
    name: str, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.core.optim import load_optimizer_state

    keys = {"args": {"fused": False}} if name == "adamw" else {}
    whole = Rig(torch.bfloat16, name=name, rounding=rounding, **keys)
    whole.steps(5)
    monkeypatch.setattr("tuner.core.optim.update.CHUNK_BYTES", 1)
    first = Rig(torch.bfloat16, name=name, rounding=rounding, **keys)
    weights = first.steps(2)
    tensors, data = optimizer_state_tensors(first.optimizer, first.names)
    second = Rig(torch.bfloat16, name=name, rounding=rounding, **keys)
    with torch.no_grad():
        for key, parameter in second.names.items():
            parameter.copy_(weights[key])
    load_optimizer_state(second.optimizer, second.names, tensors, data)
    assert same(second.steps(3, first=3), whole.weights())
    assert all(value.dtype == torch.bfloat16 for value in second.names.values())


def test_rounding_and_updates_inside_the_backward_pass_work_together() -> None:
    keys = {"rounding": "stochastic", "args": {"fused": False}}
    assert same(Rig(torch.bfloat16, fuse="parameter", **keys).fused(3, []), Rig(torch.bfloat16, **keys).steps(3))


@pytest.mark.parametrize("keys", [{"name": "adafactor"}, {"name": "prodigy", "lr": 1.0}, {"name": "torch.optim.NAdam"}])
def test_state_in_host_memory_changes_nothing(keys: dict[str, Any]) -> None:
    assert same(Rig(**keys, offload=True).steps(3), Rig(**keys).steps(3))


def test_state_leaves_the_device_after_each_update(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, places = Rig(offload=True), []
    original = rig.update._move
    rig.update._move = lambda parameters, place: (  # type: ignore[method-assign]
        places.append(place(parameters[0])),
        original(parameters, place),
    )
    rig.steps(2)
    assert len(places) == 4


def test_state_in_lists_is_moved_too() -> None:
    rig = Rig(name="counting", offload=True)
    rig.steps(1)
    rig.update._move(list(rig.names.values()), lambda _: torch.device("meta"))
    assert all(state["parts"][0].is_meta for state in rig.optimizer.state.values())


def test_the_import_path_of_an_optimizer_that_has_a_name_is_known_as_well() -> None:
    assert is_separate("torch.optim.AdamW") and is_separate("bitsandbytes.optim.AdamW8bit")
    assert not is_separate("torch.optim.NAdam") and not is_separate("prodigyopt.Prodigy")


@pytest.mark.parametrize(
    ("keys", "dtype", "words"),
    [
        ({"rounding": "kahan"}, torch.float32, "kahan rounding has no effect"),
        ({"rounding": "stochastic", "name": "adamw_schedulefree"}, torch.bfloat16, "two kinds of weights"),
        ({"fuse": "parameter", "name": "prodigy", "lr": 1.0}, torch.float32, "cannot be used with optimizer.fuse"),
        ({"offload": True, "name": "adamw_schedulefree"}, torch.float32, "cannot be used with optimizer.offload"),
        (
            {"fuse": "block", "name": "torch.optim.NAdam"},
            torch.float32,
            "not known to update",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(keys: dict[str, Any], dtype: torch.dtype, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Rig(dtype, **keys)


@pytest.mark.parametrize("keys", [{}, {"offload": True}, {"rounding": "stochastic"}, {"rounding": "kahan"}], ids=str)
@pytest.mark.parametrize("name", ["adamw", "adamw_bf16"])
def test_micro_batches_in_bfloat16_are_added_up_in_float32(name: str, keys: dict[str, Any]) -> None:
    rig, reference = Rig(torch.bfloat16, name=name, **keys), Rig(torch.bfloat16, name=name, **keys)
    add_up_in_float32(rig.update.group_of)
    for step in (1, 2):
        rig.optimizer.zero_grad()
        sums = {name: torch.zeros(value.shape) for name, value in rig.names.items()}
        for micro in range(40):
            rig.loss(100 * step + micro).backward()
            parts = torch.autograd.grad(reference.loss(100 * step + micro), list(reference.names.values()))
            for name, part in zip(sums, parts, strict=True):
                sums[name] += part
        assert same({name: value.grad for name, value in rig.names.items() if value.grad is not None}, sums)
        rig.update(step)
        # With rounding the update itself sees the sums, else what is nearest to them.
        if "rounding" in keys:
            add_up_in_float32(reference.update.group_of)
        for name, value in reference.names.items():
            value.grad = sums[name] if "rounding" in keys else sums[name].bfloat16()
        reference.update(step)
        assert same(rig.weights(), reference.weights())


def test_float32_sums_of_what_is_float32_already_are_an_error() -> None:
    with pytest.raises(UsageError, match="gradients in float32 have no effect"):
        add_up_in_float32(Rig().update.group_of)


ELSEWHERE = torch.device("cpu", 0)
"""Is not what the parameters say they are on, so they come over and go back."""


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("name", SEPARATE)
def test_weights_in_host_memory_are_updated_on_the_device_to_the_same_bits(name: str, rounding: str) -> None:
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    keys = {"name": name, "rounding": rounding}
    plain, rig = Rig(dtype, **keys), Rig(dtype, **keys)
    rig.update = Update(rig.config, rig.optimizer, rig.names, 5, ELSEWHERE)
    places = {name: value.data_ptr() for name, value in rig.names.items()}
    assert same(rig.steps(3), plain.steps(3))
    one, other = (optimizer_state_tensors(each.optimizer, each.names) for each in (rig, plain))
    assert same(one[0], other[0]) and one[1] == other[1]
    assert {name: value.data_ptr() for name, value in rig.names.items()} == places
