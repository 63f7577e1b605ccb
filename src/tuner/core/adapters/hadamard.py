"""LoHa: the update is the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2022, FedPara).

It has no low-rank form, so the matrix is built in every step, and built again in the backward pass instead of kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tuner.core.adapters.layers import ChangeLayer, Making, only_linear

if TYPE_CHECKING:
    from tuner.core.adapters.targets import Target

STARTS = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
"""Standard deviation at the start, as in LyCORIS: the update is zero and its gradient is not."""


class LohaLayer(ChangeLayer):
    """(hada_w1_a hada_w1_b) * (hada_w2_a hada_w2_b) * alpha / rank; _a [out, rank], _b [rank, in]."""

    kind = "loha"
    factors = ("hada_w1_a",)
    alpha: float
    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def __init__(self, base: nn.Module, target: Target, making: Making, stored: Mapping[str, Tensor] | None) -> None:
        linear = only_linear(base, target, self.kind)
        super().__init__(making.dropout, making.keys, making.rng, making.device)
        self.rows = (linear.out_features,)
        self.rank, self.alpha = target.rank, float(target.alpha)
        for name, deviation in STARTS.items():
            shape = (linear.out_features, self.rank) if name.endswith("_a") else (self.rank, linear.in_features)
            value = making.rng.child(name).normal(shape) * deviation if deviation else torch.zeros(shape)
            self.register_parameter(name, nn.Parameter(value.to(device=making.device, dtype=making.dtype)))

    @property
    def settings(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}"

    def change(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        factors = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        scale = self.strength * self.alpha / self.rank
        return cast("Tensor", _Product.apply(x, scale, *factors))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """x delta^T with delta = scale * (a1 b1) * (a2 b2); keeps x and the factors alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(x, a1, b1, a2, b2)
        return x @ _delta(scale, a1, b1, a2, b2).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a1, b1, a2, b2 = ctx.saved_tensors
        first, second = a1 @ b1, a2 @ b2
        x_grad = grad @ (first * second * ctx.scale).to(grad.dtype) if ctx.needs_input_grad[0] else None
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        delta_grad = (rows.t() @ inputs).to(a1.dtype) * ctx.scale
        on_first, on_second = delta_grad * second, delta_grad * first
        return x_grad, None, on_first @ b1.t(), a1.t() @ on_first, on_second @ b2.t(), a2.t() @ on_second


def _delta(scale: float, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    return (a1 @ b1) * (a2 @ b2) * scale
