"""Every kind of adapter: neutral at first, equal to its merged weights, with right gradients, and back from files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.core.adapters.toy import FACTS, MAPS, Denoiser, toy_config, toy_models, toy_x
from tests.helpers import golden, golden_path
from tuner.core.adapters.convert import convert_adapter
from tuner.core.adapters.deltas import kind_of, merged_bias, merged_weight
from tuner.core.adapters.divisors import butterfly_sizes, two_factors
from tuner.core.adapters.export import verify_export
from tuner.core.adapters.files import read_adapter, save_adapter
from tuner.core.adapters.formats import modules_of, parts_of
from tuner.core.adapters.kinds import checked_parts
from tuner.core.adapters.lora import detach, inject_lora
from tuner.core.adapters.network import adapter_rng, adapter_strength, load_network_tensors, network_tensors
from tuner.core.compute.quantized import quantize_linear
from tuner.core.errors import UsageError
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.memory.streaming import stream_blocks
from tuner.core.types import Blocks, Item, Models, Network

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "alpha": 3.0},
    "dora": {"rank": 2, "alpha": 3.0},
    "loha": {"rank": 2, "alpha": 3.0},
    "lokr": {"rank": 1, "alpha": 3.0},
    "lokr of two small factors": {"rank": 1, "alpha": 3.0, "decompose_both": True},
    "lokr of full factors": {"full_matrix": True, "factor": 2},
    "oft": {"block_size": 2},
    "oft with a limit": {"block_size": 2, "constraint": 0.01},
    "oft by count": {"block_count": 2},
    "boft": {"block_size": 6},
    "ia3": {},
    "ia3 on inputs": {"on_input": True},
    "full": {},
    "full with norms": {"train_norms": True},
}


def section(name: str, **more: Any) -> dict[str, Any]:
    kind = name.split()[0]
    without_rank = {} if "rank" in KINDS[name] else {"rank": 16}
    return {"type": kind, **without_rank, **KINDS[name], **more}


def build(name: str, models: Models | None = None, **more: Any) -> tuple[Models, Network]:
    models = models or toy_models()
    return models, inject_lora(models, toy_config(section(name, **more)), FACTS)


def randomize(network: Network) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in network.module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def merged(network: Network, models: Models, strength: float = 1.0) -> nn.Module:
    """The model with the adapter in its weights, by the dense definition."""
    assert models.denoiser is not None
    plain, tensors = models.denoiser, network_tensors(network)
    for component, path in modules_of(tensors):
        module, parts = plain.get_submodule(path), parts_of(tensors, component, path)
        module.weight.data = merged_weight(module.weight.data, parts, strength)
        if getattr(module, "bias", None) is not None:
            module.bias.data = merged_bias(module.bias.data, parts, strength)
    return plain


def run(models: Models, x: Tensor | None = None) -> Tensor:
    assert models.denoiser is not None
    out: Tensor = models.denoiser(toy_x() if x is None else x)
    return out


@pytest.mark.parametrize("name", KINDS)
def test_a_fresh_adapter_changes_no_bit_and_goes_again(name: str) -> None:
    plain = toy_models()
    models, network = build(name)
    assert torch.equal(run(models), run(plain))
    assert list(models.denoiser.state_dict()) == list(plain.denoiser.state_dict())
    randomize(network)
    assert not torch.allclose(run(models), run(plain), atol=1e-2)
    with adapter_strength(network, 0.0):
        assert torch.equal(run(models), run(plain))
    detach(network)
    assert torch.equal(run(models), run(plain))
    assert not any("adapter" in module.__dict__ for module in models.denoiser.modules())


@pytest.mark.parametrize("method", [None, "int8"])
def test_a_lokr_may_start_off_the_base_with_the_statistics_of_its_weight(method: str | None) -> None:
    plain, models = toy_models(), toy_models()
    # Of the size of a real weight, so that a sample's mean and deviation are those that were asked for.
    for each in (plain, models):
        assert each.denoiser is not None
        each.denoiser.head = wide = nn.Linear(128, 128, bias=False)
        wide.weight.data = 0.2 + 0.5 * torch.randn(128, 128, generator=torch.Generator().manual_seed(4))
        wide.requires_grad_(False)
    assert models.denoiser is not None and plain.denoiser is not None
    if method:
        quantize_linear(models.denoiser.head, method)
    _, network = build("lokr of full factors", models, targets=["head"], init_norm=0.01, factor=4)
    tensors = network_tensors(network)
    first, second = tensors["denoiser:head.lokr_w1"], tensors["denoiser:head.lokr_w2"]
    assert bool((first == 1).all()) and second.shape == (32, 32)
    assert float(second.mean()) == pytest.approx(0.002, abs=4e-4)
    assert float(second.std()) == pytest.approx(0.005, rel=0.1)
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(5))
    with adapter_strength(network, 0.0):
        base = models.denoiser.head(x)
    assert method or torch.equal(base, plain.denoiser.head(x))
    with torch.no_grad():
        moved = models.denoiser.head(x) - base
    assert 0 < float(moved.norm() / base.norm()) < 0.1


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", KINDS)
def test_the_adapted_model_equals_the_merged_one(name: str, strength: float) -> None:
    models, network = build(name)
    randomize(network)
    with adapter_strength(network, strength):
        adapted = run(models)
    torch.testing.assert_close(adapted, merged(network, toy_models(), strength)(toy_x()), rtol=1e-5, atol=1e-5)


class Dense(nn.Module):
    """A linear that builds its whole weight from the parts in every call: the reference of gradients."""

    def __init__(self, base: nn.Linear, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.base, self.values = base, parts

    def forward(self, x: Tensor) -> Tensor:
        from tuner.core.adapters import deltas

        values = {part: value.float() for part, value in self.values.items()}
        kind = kind_of(values)
        if kind == "dora":
            # The lengths of rows are constants for the gradient, as in the paper.
            direction = self.base.weight + deltas._low_rank(values)
            weight = direction * (values["dora_scale"] / direction.detach().norm(dim=1, keepdim=True))
        else:
            weight = self.base.weight + deltas.DELTAS[kind](self.base.weight, values, 1.0)
        bias = self.base.bias
        return nn.functional.linear(x, weight, bias if "diff_b" not in values else bias + values["diff_b"])


@pytest.mark.parametrize("name", [name for name in KINDS if "norms" not in name])
def test_gradients_are_those_of_the_dense_definition(name: str) -> None:
    target = {"targets": [r"blocks\.1\.mlp\.0"]}
    models, network = build(name, **target)
    randomize(network)
    x = toy_x().requires_grad_()
    run(models, x).square().sum().backward()
    mine = {key: value.grad for group in network.param_groups for key, value in group.params.items()}
    base = toy_models()
    leaves = {key: value.detach().clone() for key, value in network_tensors(network).items()}
    parts = parts_of(leaves, "denoiser", "blocks.1.mlp.0")
    for part, value in parts.items():
        value.requires_grad_(f"denoiser:blocks.1.mlp.0.{part}" in mine)
    base.denoiser.blocks[1].mlp[0] = Dense(base.denoiser.blocks[1].mlp[0], parts)
    own = toy_x().requires_grad_()
    run(base, own).square().sum().backward()
    torch.testing.assert_close(x.grad, own.grad, rtol=1e-4, atol=1e-5)
    for key, grad in mine.items():
        torch.testing.assert_close(grad, parts[key.rpartition(".")[2]].grad, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", KINDS)
def test_one_update_changes_the_output_and_its_tensors_come_back(name: str) -> None:
    models, network = build(name)
    parameters = [value for group in network.param_groups for value in group.params.values()]
    run(models).square().sum().backward()
    assert all(value.grad is not None for value in parameters)
    with torch.no_grad():
        for value in parameters:
            value.sub_(0.1 * value.grad)
    trained = run(models)
    assert not torch.equal(trained, run(toy_models()))
    others, other = build(name)
    load_network_tensors(other, {key: value.clone() for key, value in network_tensors(network).items()})
    assert torch.equal(run(others), trained)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_gives_the_same_output_and_can_be_started_from(name: str, tmp_path: Path) -> None:
    models, network = build(name)
    randomize(network)
    path = tmp_path / "a.safetensors"
    for fmt in [each for each in MAPS.formats if name.split()[0] in each.kinds and "norms" in each.kinds]:
        tensors = network_tensors(network)
        save_adapter(tensors, fmt, path, {})
        assert verify_export(path, tensors, MAPS).modules == len(modules_of(tensors))
        starts = {"type": name.split()[0], "rank": "from_file", "init_from": str(path)}
        if "norms" in name:
            starts["train_norms"] = True
        again = toy_models()
        loaded = inject_lora(again, toy_config(starts), FACTS)
        torch.testing.assert_close(run(again), run(models), rtol=1e-5, atol=1e-5)
        assert set(network_tensors(loaded)) == set(tensors)
        given, _ = build(name, init_from=str(path))
        torch.testing.assert_close(run(given), run(models), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dora", "lokr", "loha", "oft", "full"])
def test_conversion_there_and_back_keeps_every_bit(name: str, tmp_path: Path) -> None:
    _, network = build(name)
    randomize(network)
    first, other, back = (tmp_path / f"{stem}.safetensors" for stem in ("first", "other", "back"))
    save_adapter(network_tensors(network), MAPS.formats[2], first, {})
    convert_adapter(first, other, "dotted-alpha", MAPS)
    convert_adapter(other, back, "flat", MAPS)
    assert back.read_bytes() == first.read_bytes()


def test_a_format_that_cannot_hold_a_kind_says_so(tmp_path: Path) -> None:
    _, network = build("lokr")
    with pytest.raises(UsageError, match="cannot hold a lokr adapter"):
        save_adapter(network_tensors(network), MAPS.formats[3], tmp_path / "a.safetensors", {})


@pytest.mark.parametrize("name", KINDS)
def test_on_quantized_weights_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    models = toy_models()
    for module in list(models.denoiser.modules()):
        if type(module) is nn.Linear:
            quantize_linear(module, "int8")
    plain = run(models)
    models, network = build(name, models)
    assert torch.equal(run(models), plain)
    randomize(network)
    parameters = list(network.module.parameters())
    run(models).square().sum().backward()
    first = [value.grad.clone() for value in parameters]
    for value in parameters:
        value.grad = None
    for block in models.denoiser.blocks:
        inner = block.forward
        block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    run(models, toy_x().requires_grad_()).square().sum().backward()
    for value, grad in zip(parameters, first, strict=True):
        torch.testing.assert_close(value.grad, grad, rtol=1e-5, atol=1e-6)
    read_back = toy_models()
    for path, module in models.denoiser.named_modules():
        if isinstance(module, nn.Linear):
            read_back.denoiser.get_submodule(path).weight.data = module.weight.detach()
    torch.testing.assert_close(run(models), merged(network, read_back)(toy_x()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_a_skipped_adapter_leaves_its_sample_alone(name: str) -> None:
    models, network = build(name, module_dropout=0.5)
    randomize(network)
    network.module.train()
    items = [Item(id=str(number), source="a", caption="") for number in range(2)]
    with adapter_rng(network, 1, 1, items):
        first = run(models)
        assert torch.equal(run(models), first)
    with adapter_rng(network, 1, 2, items):
        assert not torch.equal(run(models), first)


@pytest.mark.parametrize("name", ["dora", "loha", "lokr", "oft", "ia3", "full with norms"])
def test_a_copied_model_keeps_working_on_its_own(name: str) -> None:
    models, network = build(name)
    randomize(network)
    copied, want = copy.deepcopy(models.denoiser), run(models)
    for parameter in network.module.parameters():
        parameter.data.zero_()
    assert torch.equal(copied(toy_x()), want)


def test_the_reference_rotation_of_a_joint_linear() -> None:
    """kohya-ss/sd-scripts: three parts of 48 rows, four blocks each, constraint 0.02."""
    values = golden("flux/oft_module.safetensors")
    outs = []
    for part in range(3):
        rows = slice(48 * part, 48 * (part + 1))
        weight = merged_weight(
            values["weight"][rows], {"oft_blocks": values[f"oft_blocks.{part}"], "alpha": torch.tensor(0.02)}
        )
        outs.append(nn.functional.linear(values["x"], weight, values["bias"][rows]))
    torch.testing.assert_close(torch.cat(outs, dim=-1), values["out"], rtol=0, atol=1e-5)
    assert golden_path("flux/oft_module.safetensors").exists()


@pytest.mark.parametrize(
    ("size", "factor", "want"),
    [
        (128, -1, (8, 16)),
        (128, 4, (4, 32)),
        (250, -1, (10, 25)),
        (250, 4, (2, 125)),
        (360, 16, (15, 24)),
        (127, 8, (1, 127)),
    ],
)
def test_sizes_of_kronecker_factors_are_those_of_lycoris(size: int, factor: int, want: tuple[int, int]) -> None:
    assert two_factors(size, factor) == want


def test_a_limit_can_be_set_when_a_file_without_one_decides_the_sizes(tmp_path: Path) -> None:
    models, network = build("oft with a limit")
    randomize(network)
    path = tmp_path / "a.safetensors"
    save_adapter(network_tensors(network), MAPS.formats[1], path, {})
    again = toy_models()
    start = {"type": "oft", "rank": "from_file", "init_from": str(path), "constraint": 0.005}
    loaded = inject_lora(again, toy_config(start), FACTS)
    tensors = network_tensors(loaded)
    limit = {key: float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    assert limit and all(value == pytest.approx(0.005) for value in limit.values())
    assert not torch.equal(run(again), run(models))


def test_sizes_of_butterflies() -> None:
    assert butterfly_sizes(96, 12) == (4, 8, 12)
    assert butterfly_sizes(6, 4) == (0, 0, 0)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"type": "loha", "targets": ["embed"]}, "is a convolution"),
        ({"type": "oft", "rank": 16, "block_count": 5}, "cannot be cut into 5 blocks"),
        ({"type": "boft", "rank": 16, "block_size": 3}, "cannot have butterfly blocks"),
    ],
)
def test_modules_that_a_kind_cannot_adapt_are_named(network: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        inject_lora(toy_models(), toy_config(network), FACTS)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"type": "lora"}, "set network.type to 'lokr'"),
        ({"type": "lokr", "rank": 2}, "from_file"),
    ],
)
def test_a_start_of_another_kind_or_size_is_refused(network: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, other = build("lokr")
    path = tmp_path / "a.safetensors"
    save_adapter(network_tensors(other), MAPS.formats[1], path, {})
    assert read_adapter(path, MAPS).keys == len(network_tensors(other))
    with pytest.raises(UsageError) as error:
        inject_lora(toy_models(), toy_config({**network, "init_from": str(path)}), FACTS)
    assert message in str(error.value)


def gradients(models: Models, network: Network) -> list[Tensor]:
    parameters = list(network.module.parameters())
    loss = run(models, toy_x().requires_grad_()).square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_streamed_and_recomputed_blocks_give_the_same_bits(name: str, recompute: bool) -> None:
    torch.manual_seed(1)
    models = Models(denoiser=Denoiser(blocks=5).requires_grad_(False))
    _, network = build(name, models)
    randomize(network)
    expected = gradients(models, network)
    stream_blocks(models.denoiser, [Blocks(path="blocks", count=5)], 3, torch.device("cpu"))
    if recompute:
        apply_checkpointing(list(models.denoiser.blocks), "block", 1)
    for found, want in zip(gradients(models, network), expected, strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("name", ["dora", "lokr", "full with norms"])
def test_a_compiled_block_is_one_graph_with_the_same_numbers(name: str) -> None:
    models, network = build(name)
    randomize(network)
    block, results = models.denoiser.blocks[1], []
    for forward in (block.forward, torch.compile(block.forward, backend="aot_eager", fullgraph=True)):
        network.module.zero_grad()
        x = toy_x().requires_grad_()
        out = forward(x)
        out.square().sum().backward()
        grads = [value.grad for value in network.module.parameters() if value.grad is not None]
        results.append([out.detach(), x.grad, *(grad.clone() for grad in grads)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_in_bfloat16_the_frozen_weights_stay_and_the_start_is_neutral(name: str) -> None:
    plain = toy_models()
    plain.denoiser.to(torch.bfloat16)
    models = toy_models()
    models.denoiser.to(torch.bfloat16)
    models, network = build(name, models)
    x = toy_x().bfloat16()
    assert torch.equal(run(models, x), run(plain, x))
    randomize(network)
    out = run(models, x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in network.module.parameters())
    torch.testing.assert_close(out, merged(network, plain)(x), rtol=0.1, atol=0.1)


def test_lengths_of_columns_are_not_taken_for_those_of_rows() -> None:
    square = {"down": torch.ones(2, 8), "up": torch.ones(8, 2)}
    for shape in ((8,), (8, 1), (8, 1, 1, 1)):
        assert checked_parts({**square, "dora_scale": torch.ones(shape)}, "a")["dora_scale"].shape == (8, 1)
    with pytest.raises(UsageError, match=r"shape \[1, 8\] for 8 rows"):
        checked_parts({**square, "dora_scale": torch.ones(1, 8)}, "a")
