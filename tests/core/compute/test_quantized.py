"""Weights in few bits: errors of the published order, right gradients, the memory they promise, and no surprises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from tuner.core.adapters.layers import Dropout, DropoutKeys, LoraLayer, eject, inject
from tuner.core.compute.linear import project, share_storage
from tuner.core.compute.low_bits import FORMATS, NF4_LEVELS, PIECE, decode, encode, group_size, stored_bytes
from tuner.core.compute.quantized import QuantizedLinear, multiplying, quantize_linear, set_arithmetic
from tuner.core.rng import Rng

ERRORS = {"int8": 0.0055, "fp8": 0.0265, "fp8_unscaled": 0.034, "int4": 0.067, "nf4": 0.094}
"""Relative output errors of one random 768-wide linear in bf16 that other implementations reach, rounded up."""
BITS = {"int8": 8, "fp8": 8, "fp8_unscaled": 8, "int4": 4.5, "nf4": 4.25}
ARITHMETIC = {"int8": 0.010, "fp8": 0.039}
METHODS = tuple(FORMATS)


def linear(inputs: int = 768, outputs: int = 768, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def far(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def output_and_gradient(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_input_gradients_have_the_error_of_the_format(method: str, dtype: torch.dtype) -> None:
    plain, x, grad = linear(), inputs(2, 64, 768), inputs(2, 64, 768) * 1e-4
    y, x_grad = output_and_gradient(plain, x, grad)
    quantized = quantize_linear(copy.deepcopy(plain).to(dtype), method)
    found = output_and_gradient(quantized, x.to(dtype), grad.to(dtype))
    assert [each.dtype for each in found] == [dtype, dtype]
    assert 0.2 * ERRORS[method] < far(found[0], y) <= ERRORS[method]
    assert 0.2 * ERRORS[method] < far(found[1], x_grad) <= ERRORS[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_product_is_that_of_the_weight_read_back_and_keeps_codes_only(method: str) -> None:
    quantized = quantize_linear(linear(128, 64), method)
    kept: list[Tensor] = []
    x = inputs(3, 5, 128).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        y = quantized(x)
    weight = quantized.weight
    torch.testing.assert_close(y, x @ weight.t() + quantized.bias)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], weight.sum(0).expand(3, 5, 128))
    # Neither the input nor a weight of full size waits for the backward pass.
    assert sum(each.numel() * each.element_size() for each in kept) == quantized.stored_bytes


@pytest.mark.parametrize("method", METHODS)
def test_weights_take_the_bits_they_promise(method: str) -> None:
    weight = linear(1024, 512).weight
    assert 8 * stored_bytes(encode(method, weight)) / weight.numel() == pytest.approx(BITS[method], abs=0.04)


@pytest.mark.parametrize("method", METHODS)
def test_pieces_give_what_the_whole_gives(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = linear(128, 50).weight
    stored = encode(method, weight)
    whole = decode(method, stored, torch.bfloat16)
    monkeypatch.setattr("tuner.core.compute.low_bits.PIECE", 128 * 7)
    assert weight.numel() < PIECE
    pieces = encode(method, weight)
    assert all(one is None or torch.equal(one, other) for one, other in zip(stored, pieces, strict=True))
    assert torch.equal(decode(method, pieces, torch.bfloat16), whole)


@pytest.mark.parametrize("method", METHODS)
def test_zero_rows_constant_rows_and_outliers_are_kept(method: str) -> None:
    weight = inputs(4, 64) * 0.02
    weight[0], weight[1], weight[2, 3] = 0.0, 0.5, 40.0
    back = decode(method, encode(method, weight), torch.float32)
    assert torch.equal(back[0], weight[0])
    torch.testing.assert_close(back[1], weight[1], rtol=0.01, atol=0)
    torch.testing.assert_close(back[2, 3], weight[2, 3], rtol=0.05, atol=0)


def test_the_levels_of_nf4_are_the_published_ones() -> None:
    published = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
                 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)  # fmt: skip
    assert pytest.approx(published, abs=1e-4) == NF4_LEVELS


@pytest.mark.parametrize("columns", [8, 24, 96, 160])
def test_groups_fit_rows_of_any_usual_length(columns: int) -> None:
    assert columns % group_size(columns) == 0
    weight = inputs(6, columns)
    for method in ("int4", "nf4"):
        assert far(decode(method, encode(method, weight), torch.float32), weight) < 0.12
    with pytest.raises(ValueError, match="cannot be grouped"):
        encode("nf4", inputs(6, 12))


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        encode("int8", torch.full((2, 8), float("nan")))


# --- quantized arithmetic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ARITHMETIC)
def test_quantized_arithmetic_is_close_both_ways(kind: Any, dtype: torch.dtype) -> None:
    plain, x, grad = linear(), inputs(2, 64, 768), inputs(2, 64, 768) * 1e-4
    y, x_grad = output_and_gradient(plain, x, grad)
    quantized = quantize_linear(copy.deepcopy(plain).to(dtype), kind)
    quantized.arithmetic = kind
    found = output_and_gradient(quantized, x.to(dtype), grad.to(dtype))
    assert far(found[0], y) <= ARITHMETIC[kind]
    assert far(found[1], x_grad) <= ARITHMETIC[kind]


@pytest.mark.parametrize("kind", ARITHMETIC)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_each_token_has_a_scale_of_its_own(kind: Any, rows: int) -> None:
    """A huge token does not cost the others their precision, and a zero one stays zero."""
    quantized = quantize_linear(linear(64, 32, bias=False), kind)
    quantized.arithmetic = kind
    x = inputs(rows, 64)
    alone = quantized(x)
    disturbed = quantized(torch.cat((x, x[:1] * 1e4, torch.zeros(1, 64))))
    assert torch.equal(disturbed[:rows], alone)
    assert not disturbed[-1].any()


def test_int8_products_match_whole_numbers_exactly() -> None:
    plain = linear(64, 32, bias=False)
    plain.weight.copy_(torch.randint(-127, 128, (32, 64)))
    plain.weight[:, 0] = 127
    quantized = quantize_linear(copy.deepcopy(plain), "int8")
    quantized.arithmetic = "int8"
    x = torch.randint(-127, 128, (20, 64)).float()
    x[:, 0] = 127
    torch.testing.assert_close(quantized(x), plain(x), rtol=1e-6, atol=0.01)


def test_only_sizes_and_formats_that_allow_it_change_their_arithmetic() -> None:
    model = nn.Sequential(linear(64, 32), linear(32, 12), linear(12, 32))
    for part, method in zip(model, ("int8", "int8", "fp8"), strict=True):
        quantize_linear(part, method)
    assert set_arithmetic(model, "int8") == 1
    assert [part.arithmetic for part in model] == ["int8", "weights", "weights"]


def test_the_original_weight_is_there_for_a_comparison_and_goes_afterwards() -> None:
    plain = linear(64, 32)
    quantized = quantize_linear(copy.deepcopy(plain), "nf4", keep_original=True)
    x, grad = inputs(4, 64), inputs(4, 32)
    coarse = output_and_gradient(quantized, x, grad)
    with multiplying(quantized, "original"):
        exact = output_and_gradient(quantized, x, grad)
    assert all(map(torch.equal, exact, output_and_gradient(plain, x, grad)))
    assert all(map(torch.equal, coarse, output_and_gradient(quantized, x, grad)))
    assert "original" not in dict(quantized.named_buffers()) | dict(quantized.named_parameters())
    quantized.original = None
    assert not quantized.can_multiply("original")


# --- as part of a model -----------------------------------------------------------------------------------------------


def adapter(base: nn.Module) -> LoraLayer:
    layer = LoraLayer(
        base, rank=4, alpha=4.0, dropout=Dropout(), keys=DropoutKeys(), dtype=torch.float32, rng=Rng(0, "x")
    )
    layer.up.data.copy_(0.1 * Rng(1).normal(layer.up.shape))
    return layer


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_trains_on_top_and_goes_again(method: str) -> None:
    quantized = quantize_linear(linear(64, 32), method)
    x, grad = inputs(2, 5, 64), inputs(2, 5, 32)
    before = output_and_gradient(quantized, x, grad)
    layer = adapter(quantized)
    record = inject(quantized, layer)
    y, x_grad = output_and_gradient(quantized, x, grad)
    delta = layer.up @ layer.down
    torch.testing.assert_close(y, before[0] + x @ delta.t())
    torch.testing.assert_close(x_grad, before[1] + grad @ delta)
    torch.testing.assert_close(layer.up.grad, (grad.flatten(0, 1).t() @ (x @ layer.down.t()).flatten(0, 1)))
    assert layer.down.grad is not None
    eject(record)
    assert all(map(torch.equal, before, output_and_gradient(quantized, x, grad)))


def test_adapters_come_after_quantization_and_trained_weights_stay_plain() -> None:
    adapted = linear(64, 32)
    inject(adapted, adapter(adapted))
    with pytest.raises(RuntimeError, match="before adapters"):
        quantize_linear(adapted, "int8")
    with pytest.raises(RuntimeError, match="before adapters"):
        quantize_linear(quantize_linear(linear(64, 32), "int8"), "nf4")
    with pytest.raises(RuntimeError, match="trains"):
        quantize_linear(nn.Linear(64, 32), "int8")


def test_shared_storage_is_given_up_and_plain_members_go_on() -> None:
    q, k, v = (linear(64, size) for size in (32, 16, 16))
    x = inputs(4, 64)
    wanted = [each(x) for each in (q, k, v)]
    share_storage([q, k, v])
    quantize_linear(q, "int8")
    assert k.weight.untyped_storage().nbytes() == k.weight.numel() * 4
    found = project(x, (q, k, v))
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[2])
    assert 0 < far(found[0], wanted[0]) < 0.01


@pytest.mark.parametrize("method", METHODS)
def test_states_copies_and_casts_keep_every_bit(method: str) -> None:
    quantized = quantize_linear(linear(64, 32), method)
    before = quantized.weight
    other = quantize_linear(linear(64, 32), method)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(load(save(quantized.state_dict())), strict=True)
    assert torch.equal(other.weight, before)
    assert torch.equal(copy.deepcopy(quantized).weight, before)
    quantized.to(torch.bfloat16)
    assert isinstance(quantized, QuantizedLinear) and quantized.bias.dtype == torch.bfloat16
    assert torch.equal(quantized.weight, decode(method, other.stored, torch.bfloat16))
    assert torch.equal(quantized.to(torch.float32).weight, before)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_compiled_it_is_one_graph_with_the_same_numbers(method: str) -> None:
    quantized = quantize_linear(linear(64, 32), method)
    inject(quantized, adapter(quantized))
    torch._dynamo.reset()
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    x, grad = inputs(6, 64), inputs(6, 32)
    for kind in ("weights", "int8") if method == "int8" else ("weights",):
        quantized.arithmetic = kind  # type: ignore[assignment]
        eager, graph = (output_and_gradient(each, x, grad) for each in (quantized, compiled))
        assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(eager, graph, strict=True))
