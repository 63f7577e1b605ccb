"""Optimizers by name, their options, and the rates of their groups."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from tuner.core.config import OptimizerConfig
from tuner.core.errors import UsageError
from tuner.core.optim import build_optimizer, learning_rates, optimizer_names, register, registry, torch_groups
from tuner.core.optim.adafactor import Adafactor
from tuner.core.optim.lion import Lion
from tuner.core.types import ParamGroup


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.down": (3, 5), "a.up": (4, 3), "b": (6,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def param_groups() -> list[ParamGroup]:
    params = parameters()
    return [
        ParamGroup(name="denoiser.down", component="denoiser", params={"a.down": params["a.down"]}, role="down"),
        ParamGroup(name="denoiser.up", component="denoiser", params={"a.up": params["a.up"]}, role="up"),
        ParamGroup(name="text", component="text", params={"b": params["b"]}),
    ]


def build(name: str = "adamw", **keys) -> torch.optim.Optimizer:
    config = OptimizerConfig(name=name, **({"lr": 1e-2} | keys))
    return build_optimizer(config, param_groups(), "cpu", ("text",))


def error_of(name: str = "adamw", **keys) -> str:
    with pytest.raises(UsageError) as caught:
        build(name, **keys)
    return str(caught.value)


def rates(groups: list[ParamGroup] | None = None, **keys) -> dict[str, float]:
    config = OptimizerConfig(**({"lr": 1e-2} | keys))
    return {group["name"]: group["lr"] for group in torch_groups(config, groups or param_groups(), ("text",))}


def train(optimizer: torch.optim.Optimizer, steps: int = 30) -> tuple[float, float]:
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def loss() -> torch.Tensor:
        return sum(((parameter - 0.5) ** 2).sum() for parameter in params)

    if hasattr(optimizer, "train"):
        optimizer.train()
    before = loss().item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return before, loss().item()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("adamw", {}),
        ("AdamW", {"betas": [0.9, 0.99], "weight_decay": 0.0, "eps": 1e-7}),
        ("lion", {}),
        ("adafactor", {}),
        ("adafactor", {"lr": 1.0, "args": {"relative_step": True, "scale_parameter": True, "warmup_init": True}}),
        ("sgd", {"args": {"momentum": 0.9, "nesterov": True}}),
        ("sgd_nesterov", {"lr": 1e-3}),
        ("adamw_bf16", {}),
        ("muon", {}),
        ("radam", {}),
        ("adam", {}),
        ("adagrad", {}),
        ("torch.optim.RAdam", {}),
        ("torch.optim.Adafactor", {}),
    ],
    ids=str,
)
def test_an_optimizer_lowers_a_loss(name: str, keys: dict) -> None:
    before, after = train(build(name, **keys))
    assert after < before


@pytest.mark.parametrize(
    ("name", "package"),
    [("prodigy", "prodigyopt"), ("adamw_schedulefree", "schedulefree"), ("adamw8bit", "bitsandbytes")],
)
def test_an_optional_optimizer_trains_when_its_package_is_there_and_names_it_when_not(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package != "bitsandbytes":
        before, after = train(build(name, lr=1.0 if name == "prodigy" else 1e-2))
        assert after < before
    monkeypatch.delitem(sys.modules, registry.BUILTIN[name].module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    message = error_of(name, lr=1.0)
    assert f"needs the package {package}, which is not installed" in message
    assert f"pip install {package}" in message


def test_adamw_runs_in_one_kernel_unless_told_otherwise() -> None:
    assert build("adamw").defaults["fused"] is True
    assert build("adamw", args={"foreach": True}).defaults["fused"] is None
    assert build("adamw", args={"fused": False}).defaults["fused"] is False


def test_left_out_settings_are_the_optimizers_own() -> None:
    assert build("adamw").defaults["weight_decay"] == 0.01
    assert build("adamw").defaults["betas"] == (0.9, 0.999)
    assert build("lion").defaults["betas"] == (0.9, 0.99)
    assert build("sgd").defaults["weight_decay"] == 0


def test_lists_in_args_become_tuples() -> None:
    assert build("adafactor", args={"eps": [1e-20, 1e-2]}).defaults["eps"] == (1e-20, 1e-2)


@pytest.mark.parametrize(
    ("name", "keys", "parts"),
    [
        ("adamww", {}, ["no optimizer is called 'adamww'", "did you mean 'adamw'?"]),
        ("sdnq-adamw", {}, ["quantize the weights they train"]),
        ("SGDNesterov8bit", {}, ["does nothing with it", "sgd_nesterov"]),
        ("nowhere_to_be_found.optim.X", {}, ["pip install nowhere_to_be_found"]),
        ("torch.optimizers.AdamW", {}, ["has no module torch.optimizers", "check the import path"]),
        ("torch.optim.AdamWW", {}, ["did you mean torch.optim.AdamW?"]),
        ("sgd", {"betas": [0.9, 0.99]}, ["takes no betas", "optimizer.betas"]),
        ("adamw", {"args": {"amsgrd": True}}, ["takes no argument 'amsgrd'", "did you mean 'amsgrad'?"]),
        ("adamw", {"args": {"lr": 1.0}}, ["use optimizer.lr"]),
        ("adamw", {"weight_decay": 0.1, "args": {"weight_decay": 0.2}}, ["use optimizer.weight_decay"]),
        ("adafactor", {"args": {"warmup_init": True}}, ["refuses its settings", "warmup_init needs relative_step"]),
        ("adamw", {"betas": (0.9, 0.99, 0.999)}, ["takes 2 betas, not 3", "optimizer.betas"]),
        ("adamw", {"args": {"fused": True, "foreach": True}}, ["refuses its settings", "fused"]),
        ("adafactor", {"eps": 1e-8}, ["give them as args.eps"]),
        ("prodigy", {"lr": 1.0, "lr_by_component": {"text": 0.5}}, ["cannot train parts at different rates"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_setting_is_an_error_that_says_what_to_do(name: str, keys: dict, parts: list[str]) -> None:
    message = error_of(name, **keys)
    for part in parts:
        assert part in message


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_optimizer.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = error_of("broken_optimizer.X")
    assert "cannot be imported" in message
    assert "a_module_that_is_not_there" in message


def test_prodigy_with_a_small_rate_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build("prodigy", lr=1e-4)
    assert "1.0 is usual, not 0.0001" in caplog.text


def test_a_registered_factory_is_found_in_any_case_and_built_in_names_are_taken() -> None:
    register("Mine", lambda groups, lr, momentum=0.0: torch.optim.SGD(groups, lr=lr, momentum=momentum))
    try:
        assert "mine" in optimizer_names()
        assert build("MINE", args={"momentum": 0.5}).defaults["momentum"] == 0.5
        with pytest.raises(ValueError, match="built-in"):
            register("AdamW", torch.optim.SGD)
    finally:
        registry._registered.pop("mine")


def test_an_entry_point_brings_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("Theirs", "torch.optim:Adamax", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.ENTRY_POINTS else [])
    assert isinstance(build("theirs"), torch.optim.Adamax)


# --- rates ------------------------------------------------------------------------------------------------------------


def test_groups_keep_their_names_and_share_the_base_rate() -> None:
    assert rates() == {"denoiser.down": 1e-2, "denoiser.up": 1e-2, "text": 1e-2}
    assert learning_rates(build()) == rates()


def test_a_rate_comes_from_the_rule_then_the_group_then_the_component_then_the_base() -> None:
    groups = param_groups()
    groups[0] = ParamGroup(name="denoiser.down", component="denoiser", params=groups[0].params, lr=7e-3)
    keys = {"lr_by_component": {"denoiser": 5e-3}}
    assert rates(groups, **keys) == {"denoiser.down": 7e-3, "denoiser.up": 5e-3, "text": 1e-2}
    keys["lr_rules"] = [{"match": r"denoiser:a\.(down|up)", "lr": 2e-3}, {"match": ".*", "lr": 3e-3}]
    assert rates(groups, **keys) == {"denoiser.down": 2e-3, "denoiser.up": 2e-3, "text": 3e-3}


def test_a_rule_splits_a_group() -> None:
    params = parameters()
    groups = [ParamGroup(name="all", component="denoiser", params=params)]
    assert rates(groups, lr_rules=[{"match": "denoiser:b", "lr": 1e-3}]) == {"all": 1e-2, "all#2": 1e-3}


def test_loraplus_multiplies_the_rate_of_up_matrices_by_component() -> None:
    assert rates(loraplus={"denoiser": 16})["denoiser.up"] == pytest.approx(0.16)
    assert rates(loraplus={"denoiser": 16})["denoiser.down"] == 1e-2


def test_a_rate_of_zero_freezes_and_leaves_no_group() -> None:
    groups = param_groups()
    assert rates(groups, lr_by_component={"text": 0.0}) == {"denoiser.down": 1e-2, "denoiser.up": 1e-2}
    assert not groups[2].params["b"].requires_grad
    assert groups[0].params["a.down"].requires_grad


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr_by_component": {"txt": 1e-3}}, "did you mean 'text'"),
        ({"lr_rules": [{"match": "down", "lr": 1e-3}]}, "matches no parameter"),
        ({"loraplus": {"text_encoder": 4}}, "reaches no adapter"),
        ({"lr_rules": [{"match": ".*", "lr": 0}]}, "nothing would train"),
    ],
)
def test_a_rate_that_reaches_nothing_is_an_error(keys: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        rates(**keys)
    assert message in str(caught.value)


def test_logged_rates_of_prodigy_include_its_estimate() -> None:
    optimizer = build("prodigy", lr=1.0)
    train(optimizer, 3)
    assert learning_rates(optimizer)["text"] == pytest.approx(optimizer.param_groups[0]["d"])


# --- own optimizers ---------------------------------------------------------------------------------------------------


def run_pair(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    for step in range(5):
        for optimizer in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for mine, other in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "keys",
    [
        {"scale_parameter": False, "relative_step": False},
        {"scale_parameter": True, "relative_step": False, "weight_decay": 0.1, "beta1": 0.9},
        {"scale_parameter": True, "relative_step": True, "warmup_init": True},
    ],
    ids=str,
)
def test_adafactor_equals_the_one_in_transformers(keys: dict) -> None:
    from transformers.optimization import Adafactor as Reference

    ours, theirs = list(parameters().values()), list(parameters().values())
    rate = None if keys["relative_step"] else 1e-2
    run_pair(Adafactor(ours, lr=rate or 1.0, **keys), Reference(theirs, lr=rate, **keys))


def test_the_rate_scales_the_relative_step_of_adafactor() -> None:
    full, half = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    for parameter, rate in ((full, 1.0), (half, 0.5)):
        parameter.grad = torch.ones(4)
        Adafactor([parameter], lr=rate, relative_step=True).step()
    torch.testing.assert_close(half, full / 2)


def test_lion_moves_by_the_sign_of_the_blended_momentum() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.5), weight_decay=0.5)
    parameter.grad = torch.tensor([2.0, -2.0])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.85, 1.05]))
    parameter.grad = torch.tensor([-1.0, 1.0])  # momentum is now (1, -1): 0.9 of it outweighs 0.1 of the gradient
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.7075, 1.0975]))
