"""RMS norm with rotary embedding as one node: same numbers as the plain formula, less kept for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tuner.core.compute.norm_rope import rms_norm_rope

HEADS, DIM, TOKENS = 3, 16, 5
NEIGHBOURS = torch.arange(DIM).view(2, -1).t().flatten()
"""The channels j and j + d/2 side by side."""


def rotation() -> Tensor:
    angles = torch.outer(torch.arange(TOKENS), torch.rand(DIM // 2, generator=torch.Generator().manual_seed(0)))
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


def plain(x: Tensor, weight: Tensor, rope: Tensor | None) -> Tensor:
    """The formula, in the dtype of x, one operation after the other."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    if rope is None:
        return y
    cos, sin = rope[:, :, None].to(x.dtype)
    return y * cos + torch.cat((-y[..., DIM // 2 :], y[..., : DIM // 2]), dim=-1) * sin


@pytest.mark.parametrize("train_weight", [True, False])
def test_neighbouring_pairs_are_the_halves_in_another_order(train_weight: bool) -> None:
    order = NEIGHBOURS
    rope = rotation()
    x, weight = inputs(torch.float32)
    weight.requires_grad_(train_weight)
    leaves = [x, weight] if train_weight else [x]
    halves = rms_norm_rope(x, weight, rope)[..., order]
    pairs = rms_norm_rope(x[..., order], weight[order], rope[..., order], neighbours=True)
    torch.testing.assert_close(pairs, halves, atol=1e-6, rtol=0)
    grad = torch.randn(pairs.shape, generator=torch.Generator().manual_seed(2))
    for one, other in zip(
        torch.autograd.grad(pairs, leaves, grad), torch.autograd.grad(halves, leaves, grad), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def inputs(dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    # A slice of a wider tensor, as the joint projection of queries, keys and values gives it.
    joint = torch.randn(batch, TOKENS, 3 * HEADS * DIM, generator=generator, dtype=torch.float64)
    x = joint.to(dtype)[..., HEADS * DIM : 2 * HEADS * DIM].view(batch, TOKENS, HEADS, DIM)
    weight = 1 + 0.1 * torch.randn(DIM, generator=generator, dtype=torch.float64)
    return x.detach().requires_grad_(), weight.to(dtype)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("train_weight", [True, False])
def test_output_and_gradients_equal_the_plain_formula(rotated: bool, train_weight: bool) -> None:
    rope = rotation() if rotated else None
    x, weight = inputs(torch.float32)
    weight.requires_grad_(train_weight)
    leaves = [x, weight] if train_weight else [x]
    out, expected = rms_norm_rope(x, weight, rope), plain(x, weight, rope)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    actual = torch.autograd.grad(out, leaves, grad)
    for one, other in zip(actual, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_as_close_to_the_exact_result_as_rounding_the_steps_allows() -> None:
    x, weight = inputs(torch.bfloat16, batch=8)
    rope = rotation()
    exact_x = x.detach().double().requires_grad_()
    exact = plain(exact_x, weight.double(), rope.double())
    out = rms_norm_rope(x, weight, rope)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() <= 4e-3 * exact.norm()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    (actual,) = torch.autograd.grad(out, x, grad)
    (expected,) = torch.autograd.grad(exact, exact_x, grad.double())
    assert (actual.double() - expected).norm() <= 6e-3 * expected.norm()


def test_backward_keeps_the_input_and_one_float_per_row() -> None:
    x, weight = inputs(torch.bfloat16)
    rope = rotation()
    shared = {tensor.untyped_storage().data_ptr() for tensor in (x, weight, rope)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = rms_norm_rope(x, weight, rope)
    assert sum(kept.values()) == 4 * x.numel() // DIM
    out.sum().backward()


def test_a_zero_row_gives_zeros_and_finite_gradients() -> None:
    x = torch.zeros(1, TOKENS, HEADS, DIM, requires_grad=True)
    out = rms_norm_rope(x, torch.ones(DIM), rotation())
    out.sum().backward()
    assert not out.any()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("neighbours", [False, True])
def test_it_compiles_without_a_graph_break(neighbours: bool) -> None:
    torch._dynamo.reset()
    x, weight = inputs(torch.float32)
    compiled = torch.compile(rms_norm_rope, backend="eager", fullgraph=True)
    rope = rotation()[..., NEIGHBOURS] if neighbours else rotation()
    out = compiled(x, weight, rope, neighbours=neighbours)
    torch.testing.assert_close(out, rms_norm_rope(x, weight, rope, neighbours=neighbours))
