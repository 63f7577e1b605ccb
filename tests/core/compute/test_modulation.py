"""Adaptive norm and gated residual equal their formulas for one sample and for several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tuner.core.compute.modulation import gated_residual, modulated_norm


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("batch", [1, 3])
def test_modulated_norm_equals_its_formula_with_gradients(batch: int) -> None:
    x, shift, scale = draw(batch, 5, 8, seed=1), draw(batch, 8, seed=2), draw(batch, 8, seed=3)
    expected = functional.layer_norm(x, (8,), eps=1e-6) * scale[:, None] + shift[:, None]
    actual = modulated_norm(x, shift, scale)
    torch.testing.assert_close(actual, expected)
    leaves = (x, shift, scale)
    for one, other in zip(
        torch.autograd.grad(actual.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_gated_residual_equals_its_formula(batch: int) -> None:
    x, gate, update = draw(batch, 5, 8, seed=1), draw(batch, 8, seed=2), draw(batch, 5, 8, seed=3)
    torch.testing.assert_close(gated_residual(x, gate, update), x + gate[:, None] * update)


def test_a_frozen_gate_keeps_no_activation_for_backward() -> None:
    x, gate, update = draw(2, 5, 8, seed=1), draw(2, 8, seed=2).detach(), draw(2, 5, 8, seed=3)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gated_residual(x, gate, update)
    assert max(kept, default=0) <= gate.numel()
