"""Optimizer state survives safetensors and JSON bit for bit, and refuses to go where it does not belong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tuner.core.config import OptimizerConfig, ScheduleConfig
from tuner.core.errors import UsageError
from tuner.core.optim import (
    LrSchedule,
    build_optimizer,
    eval_weights,
    load_optimizer_state,
    optimizer_state_tensors,
)
from tuner.core.types import ParamGroup

OPTIMIZERS = {
    "adamw": {},
    "adamw-foreach": {"name": "adamw", "args": {"foreach": True, "amsgrad": True}},
    "lion": {},
    "adafactor": {"args": {"beta1": 0.9, "scale_parameter": True}},
    "sgd": {"args": {"momentum": 0.9}},
    "sgd_nesterov": {},
    "adamw_bf16": {},
    "muon": {},
    "prodigy": {"lr": 1.0},
    "adamw_schedulefree": {},
    "torch.optim.Adafactor": {},
    "torch.optim.NAdam": {},
}


class Setup:
    def __init__(self, label: str, shape: tuple[int, ...] = (4, 3)) -> None:
        generator = torch.Generator().manual_seed(1)
        self.names = {
            "a.down": nn.Parameter(torch.randn(shape, generator=generator)),
            "a.up": nn.Parameter(torch.randn(5, 4, generator=generator)),
            "b": nn.Parameter(torch.randn(7, generator=generator)),
        }
        down, up, bias = ({name: parameter} for name, parameter in self.names.items())
        groups = [
            ParamGroup(name="down", component="denoiser", params=down | bias),
            ParamGroup(name="up", component="denoiser", params=up),
        ]
        self.optimizer = build_optimizer(
            OptimizerConfig(**({"name": label, "lr": 1e-2} | OPTIMIZERS[label])), groups, "cpu"
        )
        self.schedule = LrSchedule(self.optimizer, ScheduleConfig(warmup=3), 20)

    def run(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.schedule.set(step)
            generator = torch.Generator().manual_seed(100 + step)
            for parameter in self.names.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.names.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def through_files(setup: Setup, folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    tensors, data = optimizer_state_tensors(setup.optimizer, setup.names)
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(data, allow_nan=False))
    return load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())


@pytest.mark.parametrize("label", OPTIMIZERS)
def test_two_resumes_end_with_the_same_bits_as_none(label: str, tmp_path: Path) -> None:
    whole = Setup(label)
    whole.run(0, 9)
    setup = Setup(label)
    setup.run(0, 4)
    for stop in (7, 9):
        tensors, data = through_files(setup, tmp_path)
        weights = setup.weights()
        setup = Setup(label)
        with torch.no_grad():
            for name, parameter in setup.names.items():
                parameter.copy_(weights[name])
        load_optimizer_state(setup.optimizer, setup.names, tensors, data)
        setup.run({7: 4, 9: 7}[stop], stop)
    assert same(setup.weights(), whole.weights())
    assert same(
        optimizer_state_tensors(setup.optimizer, setup.names)[0],
        optimizer_state_tensors(whole.optimizer, whole.names)[0],
    )


def test_state_from_before_the_first_step_loads() -> None:
    setup = Setup("adamw")
    tensors, data = optimizer_state_tensors(setup.optimizer, setup.names)
    assert tensors == {}
    load_optimizer_state(setup.optimizer, setup.names, tensors, data)


def test_saving_makes_no_copy_of_the_state() -> None:
    setup = Setup("adamw")
    setup.run(0, 1)
    tensors, _ = optimizer_state_tensors(setup.optimizer, setup.names)
    own = {value.data_ptr() for state in setup.optimizer.state.values() for value in state.values()}
    assert {value.data_ptr() for value in tensors.values()} == own


def test_offloaded_state_comes_back_to_host_memory() -> None:
    saved = Setup("adamw-foreach")
    saved.run(0, 2)
    tensors, data = optimizer_state_tensors(saved.optimizer, saved.names)
    elsewhere = Setup("adamw-foreach")
    moved = {one: nn.Parameter(torch.empty_like(one, device="meta")) for one in elsewhere.names.values()}
    elsewhere.names = {name: moved[parameter] for name, parameter in elsewhere.names.items()}
    for group in elsewhere.optimizer.param_groups:
        group["params"] = [moved[parameter] for parameter in group["params"]]
    load_optimizer_state(elsewhere.optimizer, elsewhere.names, tensors, data, offloaded=True)
    for parameter in elsewhere.names.values():
        assert elsewhere.optimizer.state[parameter]["exp_avg"].device.type == "cpu"
    load_optimizer_state(elsewhere.optimizer, elsewhere.names, tensors, data)
    for parameter in elsewhere.names.values():
        assert elsewhere.optimizer.state[parameter]["exp_avg"].device.type == "meta"


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    saved = Setup("adamw")
    saved.run(0, 2)
    tensors, data = optimizer_state_tensors(saved.optimizer, saved.names)

    def refusal(setup: Setup, tensors: dict, data: dict) -> str:
        with pytest.raises(UsageError) as caught:
            load_optimizer_state(setup.optimizer, setup.names, tensors, data)
        assert not setup.optimizer.state
        return str(caught.value)

    assert "it is from AdamW, this run uses Lion" in refusal(Setup("lion"), tensors, data)
    assert "has shape (2, 3) here and (4, 3) there" in refusal(Setup("adamw", (2, 3)), tensors, data)
    missing = {name: tensor for name, tensor in tensors.items() if name != "b/exp_avg"}
    assert "the tensor b/exp_avg is missing" in refusal(Setup("adamw"), missing, data)
    assert "nothing asks for, for example odd" in refusal(Setup("adamw"), tensors | {"odd": torch.zeros(1)}, data)
    fewer = data | {"groups": data["groups"][:1]}
    assert "1 parameter groups, this run has 2" in refusal(Setup("adamw"), tensors, fewer)
    renamed = json.loads(json.dumps(data).replace('"a.up"', '"a.other"'))
    assert "its parameters are others" in refusal(Setup("adamw"), tensors, renamed)


def test_state_that_only_pickle_could_store_is_refused() -> None:
    setup = Setup("sgd")
    setup.optimizer.param_groups[0]["odd"] = object()
    with pytest.raises(UsageError, match="cannot be saved"):
        optimizer_state_tensors(setup.optimizer, setup.names)


def test_numbers_that_json_has_no_word_for_survive() -> None:
    setup = Setup("sgd")
    setup.optimizer.param_groups[0]["limit"] = float("-inf")
    setup.optimizer.param_groups[0]["pair"] = (1, [2.5, None])
    tensors, data = optimizer_state_tensors(setup.optimizer, setup.names)
    other = Setup("sgd")
    load_optimizer_state(other.optimizer, other.names, tensors, json.loads(json.dumps(data, allow_nan=False)))
    assert other.optimizer.param_groups[0]["limit"] == float("-inf")
    assert other.optimizer.param_groups[0]["pair"] == (1, [2.5, None])


def test_looking_at_a_schedule_free_model_shows_other_weights_and_changes_no_bit() -> None:
    setup, alone = Setup("adamw_schedulefree"), Setup("adamw_schedulefree")
    alone.run(0, 6)
    setup.run(0, 4)
    before = setup.weights()
    with eval_weights(setup.optimizer):
        assert not same(setup.weights(), before)
    assert same(setup.weights(), before)
    setup.run(4, 6)
    assert same(setup.weights(), alone.weights())


def test_other_optimizers_have_one_kind_of_weights() -> None:
    setup = Setup("adamw")
    setup.run(0, 2)
    before = setup.weights()
    with eval_weights(setup.optimizer):
        assert same(setup.weights(), before)


def test_a_schedule_free_optimizer_refuses_a_decaying_schedule() -> None:
    setup = Setup("adamw_schedulefree")
    with pytest.raises(UsageError, match="cannot follow the schedule 'cosine'"):
        LrSchedule(setup.optimizer, ScheduleConfig(name="cosine"), 20)


class Halves(torch.Tensor):
    """A tensor made of two others and a dtype, as torchao keeps its 8-bit states."""

    def __new__(cls, low, high, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, low.shape, dtype=dtype)

    def __init__(self, low, high, dtype) -> None:
        self.low, self.high, self.wanted = low, high, dtype

    def __tensor_flatten__(self):
        return ["low", "high"], [self.wanted, self.low.shape]

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["low"], parts["high"], context[0])

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        return args[0]


def test_state_made_of_several_tensors_survives_when_its_package_is_known(tmp_path, monkeypatch) -> None:
    def saved() -> tuple[dict, dict]:
        setup = Setup("sgd")
        value = Halves(torch.arange(12.0).reshape(4, 3), torch.ones(4, 3), torch.bfloat16)
        setup.optimizer.state[setup.names["a.down"]] = {"exp_avg": value}
        return through_files(setup, tmp_path)

    with pytest.raises(UsageError, match="Halves, which is not restored"):
        load_optimizer_state((other := Setup("sgd")).optimizer, other.names, *saved())
    monkeypatch.setattr(Halves, "__module__", "torchao")
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(Halves=Halves))
    other = Setup("sgd")
    load_optimizer_state(other.optimizer, other.names, *saved())
    restored = other.optimizer.state[other.names["a.down"]]["exp_avg"]
    assert isinstance(restored, Halves) and restored.wanted == torch.bfloat16
    assert torch.equal(restored.low, torch.arange(12.0).reshape(4, 3)) and torch.equal(restored.high, torch.ones(4, 3))
