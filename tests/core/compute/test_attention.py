"""Attention behind one function: masks, biases, splitting, and the choice of a backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tuner.core.compute.attention import attention
from tuner.core.errors import UsageError


def heads(tokens: int, seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, tokens, 8, generator=torch.Generator().manual_seed(seed))


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1) @ v


def test_it_is_softmax_of_scaled_products() -> None:
    q, k, v = heads(5, 1), heads(7, 2), heads(7, 3)
    torch.testing.assert_close(attention(q, k, v), plain(q, k, v))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 1, 1, 7)])
def test_a_float_bias_is_added_to_the_logits(shape: tuple[int, ...]) -> None:
    q, k, v = heads(5, 1), heads(7, 2), heads(7, 3)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(attention(q, k, v, bias=bias), plain(q, k, v, bias))


def test_queries_without_a_single_key_get_zero_and_no_nan_gradient() -> None:
    q, k, v = heads(5, 1).requires_grad_(), heads(7, 2), heads(7, 3)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, 0, 2] = False
    mask[1] = False
    out = attention(q, k, v, bias=mask)
    assert not out[0, :, 2].any()
    assert not out[1].any()
    torch.testing.assert_close(out[0, :, 3], plain(q, k, v)[0, :, 3])
    out.square().sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert not q.grad[1].any()


@pytest.mark.parametrize("mask", [None, "per sample", "shared"])
def test_splitting_by_sample_changes_nothing_and_keeps_every_key(mask: str | None) -> None:
    # Fewer queries than keys: cutting k and v to the number of queries would show.
    q, k, v = heads(3, 1), heads(9, 2), heads(9, 3)
    bias = None
    if mask is not None:
        bias = torch.rand(2 if mask == "per sample" else 1, 1, 1, 9, generator=torch.Generator().manual_seed(4)) > 0.3
    torch.testing.assert_close(attention(q, k, v, bias=bias, split=True), attention(q, k, v, bias=bias))


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="flash9") as caught:
        attention(heads(2, 1), heads(2, 2), heads(2, 3), backend="flash9")
    assert "sdpa" in str(caught.value)
