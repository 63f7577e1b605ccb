"""A LoRA in a model: neutral at the start, in place, removable, reproducible, and grouped as the optimizer wants it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.core.adapters.toy import FACTS, MAPS, WIDTH, toy_config, toy_models, toy_x
from tuner.core.adapters.deltas import merged_weight
from tuner.core.adapters.files import save_adapter
from tuner.core.adapters.formats import parts_of
from tuner.core.adapters.lora import detach, inject_lora
from tuner.core.adapters.network import (
    adapter_rng,
    adapter_strength,
    adapter_summary,
    count_parameters,
    load_network_tensors,
    network_tensors,
)
from tuner.core.config import OptimizerConfig
from tuner.core.errors import UsageError
from tuner.core.optim import torch_groups
from tuner.core.types import Item, Models, Network

WITH_CONV = {"include": ["embed", "head"]}


def build(network: dict[str, Any] | None = None, models: Models | None = None, **kwargs: Any) -> tuple[Models, Network]:
    models = models or toy_models()
    return models, inject_lora(models, toy_config(network, **kwargs), FACTS)


def randomize(network: Network, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.module.parameters():
        parameter.data.normal_(std=0.3, generator=generator)


def items(*names: str) -> list[Item]:
    return [Item(id=name, source="a", caption="") for name in names]


def run(models: Models, x: Tensor | None = None) -> Tensor:
    return models.denoiser(toy_x() if x is None else x)


def test_a_fresh_adapter_changes_nothing_and_keeps_every_name() -> None:
    plain = toy_models()
    models, network = build(WITH_CONV)
    assert torch.equal(run(models), run(plain))
    assert list(models.denoiser.state_dict()) == list(plain.denoiser.state_dict())
    assert [name for name, _ in models.denoiser.named_modules()] == [name for name, _ in plain.denoiser.named_modules()]
    assert not any(parameter.requires_grad for parameter in models.denoiser.parameters())
    assert all(parameter.requires_grad for parameter in network.module.parameters())


def test_the_adapted_model_equals_the_merged_model() -> None:
    models, network = build({**WITH_CONV, "alpha": 3.0})
    randomize(network)
    merged = toy_models()
    tensors = network_tensors(network)
    for key in {name.rpartition(".")[0] for name in tensors}:
        module = merged.denoiser.get_submodule(key.partition(":")[2])
        parts = parts_of(tensors, *key.split(":"))
        module.weight.data = merged_weight(module.weight, parts)
    torch.testing.assert_close(run(models), run(merged), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run(models), run(toy_models()), atol=1e-2)


def test_strength_zero_is_exactly_the_base_and_ends_with_the_context() -> None:
    models, network = build(WITH_CONV)
    randomize(network)
    adapted = run(models)
    with adapter_strength(network, 0.0):
        assert torch.equal(run(models), run(toy_models()))
        with adapter_strength(network, 1.0):
            assert torch.equal(run(models), adapted)
    assert torch.equal(run(models), adapted)


def test_a_detached_adapter_leaves_the_model_as_it_was() -> None:
    models, network = build(WITH_CONV)
    randomize(network)
    detach(network)
    assert torch.equal(run(models), run(toy_models()))
    module = models.denoiser.blocks[0].q
    assert not {"forward", "adapter", "base_forward"} & set(module.__dict__)


def test_a_copied_model_keeps_working_on_its_own() -> None:
    models, network = build(WITH_CONV)
    randomize(network)
    copied = copy.deepcopy(models.denoiser)
    want = run(models)
    assert torch.equal(copied(toy_x()), want)
    for parameter in network.module.parameters():
        parameter.data.zero_()
    assert torch.equal(copied(toy_x()), want)


def test_gradients_reach_every_adapter_parameter_and_nothing_else() -> None:
    models, network = build(WITH_CONV)
    randomize(network)
    run(models).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.module.parameters())
    assert all(parameter.grad is None for parameter in models.denoiser.parameters())


def test_the_start_depends_on_seed_and_path_alone() -> None:
    _, every = build()
    _, few = build({"targets": [r"blocks\.2\.q"]})
    _, other = build({"targets": [r"blocks\.2\.q"]}, train={"steps": 1, "seed": 8})
    key = "denoiser:blocks.2.q.down"
    assert torch.equal(network_tensors(every)[key], network_tensors(few)[key])
    assert not torch.equal(network_tensors(few)[key], network_tensors(other)[key])
    down = network_tensors(every)[key]
    bound = WIDTH**-0.5
    assert down.abs().max() <= bound
    assert down.abs().max() > 0.7 * bound
    assert not network_tensors(every)["denoiser:blocks.2.q.up"].any()


class Quantized(nn.Module):
    """A replacement linear that keeps its own arithmetic."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", linear.weight.detach().half())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype))


class QuantizedLinear(Quantized):
    pass


def test_a_replaced_linear_keeps_its_own_product_under_the_adapter() -> None:
    models = toy_models()
    models.denoiser.blocks[1].q = QuantizedLinear(models.denoiser.blocks[1].q)
    base = run(models)
    models, network = build({"targets": [r"blocks\.1\.q"]}, models)
    torch.testing.assert_close(run(models), base)
    randomize(network)
    assert not torch.allclose(run(models), base, atol=1e-3)
    run(models).sum().backward()
    detach(network)
    assert torch.equal(run(models), base)


# --- parameter groups -------------------------------------------------------------------------------------------------


def test_groups_follow_components_then_rules_then_the_rest() -> None:
    rules = [{"match": r".*mlp.*", "lr": 1e-5}, {"match": r".*\.q", "lr": 2e-5}]
    _, network = build({"rules": rules}, components=("denoiser", "words"))
    assert [(group.name, group.component, group.lr, group.role) for group in network.param_groups] == [
        (r"denoiser .*\.q", "denoiser", 2e-5, "all"),
        ("denoiser .*mlp.*", "denoiser", 1e-5, "all"),
        ("denoiser", "denoiser", None, "all"),
        ("words", "words", None, "all"),
    ]
    names = [name for group in network.param_groups for name in group.params]
    assert len(names) == len(set(names)) == len(list(network.module.parameters()))
    assert "denoiser:blocks.0.q.down" in network.param_groups[0].params


def test_loraplus_separates_the_up_matrices() -> None:
    _, network = build(optimizer={"lr": 1e-3, "loraplus": {"denoiser": 16}})
    assert [group.role for group in network.param_groups] == ["down", "up"]
    for group in network.param_groups:
        assert all(name.endswith(f".{group.role}") for name in group.params)


def test_a_rate_of_zero_freezes() -> None:
    _, network = build({"rules": [{"match": r".*mlp.*", "lr": 0}]})
    groups = torch_groups(OptimizerConfig(lr=1e-3), network.param_groups)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert {id(parameter) for parameter in network.module.parameters() if parameter.requires_grad} == trained
    frozen = [layer for target, layer in network.module.items() if "mlp" in target.path]
    assert frozen and not any(parameter.requires_grad for layer in frozen for parameter in layer.parameters())
    with pytest.raises(UsageError, match="nothing would train"):
        torch_groups(OptimizerConfig(lr=1e-3), build({"rules": [{"match": ".*", "lr": 0}]})[1].param_groups)


def test_the_summary_counts_modules_of_a_kind() -> None:
    _, network = build({"targets": [r".*\.q", r".*mlp\.0"], "rules": [{"match": ".*mlp.*", "rank": 3}]})
    rows = adapter_summary(network)
    assert [(row.kind, row.modules, row.settings, row.parameters) for row in rows] == [
        ("blocks.*.q", 3, "rank 2, alpha 2", 3 * 2 * 2 * WIDTH),
        ("blocks.*.mlp.*", 3, "rank 3, alpha 3", 3 * 3 * (WIDTH + 8)),
    ]
    assert count_parameters(network) == sum(row.parameters for row in rows)


# --- tensors and files ------------------------------------------------------------------------------------------------


def test_tensors_go_out_and_come_back() -> None:
    models, network = build(WITH_CONV)
    randomize(network)
    want = run(models)
    stored = {name: value.clone() for name, value in network_tensors(network).items()}
    randomize(network, seed=5)
    load_network_tensors(network, stored)
    assert torch.equal(run(models), want)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "alpha"])
def test_tensors_that_differ_are_refused(change: str) -> None:
    _, network = build()
    tensors = dict(network_tensors(network))
    key = "denoiser:blocks.0.q"
    if change == "missing":
        del tensors[f"{key}.up"]
    elif change == "extra":
        tensors["denoiser:other.up"] = torch.zeros(1)
    elif change == "shape":
        tensors[f"{key}.up"] = torch.zeros(3, 3)
    else:
        tensors[f"{key}.alpha"] = torch.tensor(9.0)
    with pytest.raises(UsageError):
        load_network_tensors(network, tensors)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Tensor]:
    models, network = build({"rules": [{"match": r".*mlp.*", "rank": 3, "alpha": 6}], "alpha": 1})
    randomize(network)
    path = tmp_path / "start.safetensors"
    save_adapter(network_tensors(network), MAPS.formats[1], path, {})
    return path, run(models)


def test_the_file_decides_modules_ranks_and_alphas(saved: tuple[Path, Tensor]) -> None:
    path, want = saved
    models, network = build({"rank": "from_file", "init_from": str(path), "rules": [{"match": ".*mlp.*", "lr": 1e-5}]})
    assert torch.equal(run(models), want)
    assert {row.settings for row in adapter_summary(network)} == {"rank 2, alpha 1", "rank 3, alpha 6"}
    assert [group.lr for group in network.param_groups] == [1e-5, None]


@pytest.mark.parametrize("network", [{"targets": [".*"]}, {"alpha": 1}, {"rules": [{"match": ".*", "rank": 1}]}])
def test_choices_beside_from_file_are_refused(saved: tuple[Path, Tensor], network: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="has no effect here"):
        build({"rank": "from_file", "init_from": str(saved[0]), **network})


def test_a_start_keeps_its_effect_under_another_alpha(saved: tuple[Path, Tensor]) -> None:
    path, want = saved
    models, _ = build({"rules": [{"match": r".*mlp.*", "rank": 3}], "alpha": 5, "init_from": str(path)})
    torch.testing.assert_close(run(models), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "message"),
    [({"targets": [r".*\.q"]}, "the configuration does not"), ({"rank": 4}, "the file has rank")],
)
def test_a_start_that_does_not_fit_is_refused(
    saved: tuple[Path, Tensor], network: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build({"init_from": str(saved[0]), **network})


def test_a_start_for_a_component_that_does_not_train_is_refused(tmp_path: Path) -> None:
    _, network = build(components=("denoiser", "words"))
    path = save_adapter(network_tensors(network), MAPS.formats[0], tmp_path / "a.safetensors", {})
    with pytest.raises(UsageError, match="words, which does not train"):
        build({"rank": "from_file", "init_from": str(path)})


def test_a_component_that_the_file_does_not_adapt_is_refused(saved: tuple[Path, Tensor]) -> None:
    with pytest.raises(UsageError, match="words trains, yet the file"):
        build({"rank": "from_file", "init_from": str(saved[0])}, components=("denoiser", "words"))


def test_from_file_needs_a_file() -> None:
    with pytest.raises(UsageError, match="no file"):
        build({"rank": "from_file"})


# --- dropout ----------------------------------------------------------------------------------------------------------

RATES = [{"dropout": 0.5}, {"rank_dropout": 0.5}, {"module_dropout": 0.5}]


def draw(rate: dict[str, float], names: str = "ab", step: int = 3, x: Tensor | None = None) -> Tensor:
    models, network = build({**WITH_CONV, "rank": 8, **rate})
    randomize(network)
    with adapter_rng(network, 7, step, items(*names)):
        return run(models, x)


@pytest.mark.parametrize("rate", RATES)
def test_dropout_follows_from_seed_step_and_item(rate: dict[str, float]) -> None:
    torch.manual_seed(0)
    first = draw(rate)
    torch.manual_seed(99)
    assert torch.equal(draw(rate), first)
    assert not torch.equal(draw(rate, step=4), first)
    assert not torch.equal(draw(rate, names="cd"), first)
    torch.testing.assert_close(draw(rate, names="b", x=toy_x()[1:]), first[1:], rtol=1e-5, atol=1e-5)
    doubled = draw(rate, x=torch.cat([toy_x(), toy_x()]))
    torch.testing.assert_close(doubled[2:], first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", RATES)
def test_dropout_is_the_same_in_a_recomputed_and_in_a_compiled_block(rate: dict[str, float]) -> None:
    models, network = build({"rank": 8, **rate})
    randomize(network)
    block = models.denoiser.blocks[0]
    (group,) = network.param_groups
    parameters = [parameter for name, parameter in group.params.items() if ":blocks.0." in name]
    torch.compiler.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with adapter_rng(network, 7, 3, items("a", "b")):
        want = torch.autograd.grad(block(toy_x()).square().sum(), parameters)
        again = torch.autograd.grad(checkpoint(block, toy_x(), use_reentrant=False).square().sum(), parameters)
        graph = torch.autograd.grad(compiled(toy_x()).square().sum(), parameters)
    for one, two, three in zip(want, again, graph, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three)


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    _, network = build({"targets": [r"blocks\.0\.q"], "rank": 64, "dropout": 0.25})
    layer = next(layer for _, layer in network.module.items())
    x = torch.zeros(4, 500, WIDTH)
    with adapter_rng(network, 7, 3, items(*"abcd")):
        mask = layer.mid_mask(x)
    assert mask.shape == (4, 500, 64)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(float((mask == 0).float().mean()) - 0.25) < 0.005
    assert abs(float((mask[0] == mask[1]).float().mean()) - (0.25**2 + 0.75**2)) < 0.01


def test_without_its_random_numbers_dropout_is_off_in_inference_and_refused_in_training() -> None:
    models, network = build({"dropout": 0.5})
    randomize(network)
    with torch.no_grad():
        plain = run(models)
    with pytest.raises(RuntimeError, match="adapter_rng"):
        run(models)
    network.module.eval()
    assert torch.allclose(run(models), plain)


def test_a_dropout_of_one_is_refused() -> None:
    with pytest.raises(UsageError, match="trains nothing"):
        build({"rank_dropout": 1.0})
