"""Muon: orthogonalised momentum for matrices, AdamW for the rest (Jordan et al. 2024, kellerjordan.github.io)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tuner.core.optim.base import ParameterWise, check_betas

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the publication's Newton-Schulz iteration: five rounds bring singular values near 1."""


class Muon(ParameterWise):
    """A matrix moves by lr * 0.2 * sqrt(larger side) along the orthogonal factor of its Nesterov momentum.

    That scale (Liu et al. 2025, arXiv:2502.16982) gives updates the size of AdamW's, so AdamW rates carry over. Weight
    decay is decoupled. betas and eps are those of AdamW for tensors that are no matrices. Convolution kernels are taken
    as matrices [out, the rest].
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        iterations: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), not {momentum}")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "iterations": iterations,
                "betas": check_betas(betas),
                "eps": eps,
                "weight_decay": weight_decay,
            },
        )

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        if parameter.ndim < 2:
            _adam(parameter, gradient.float(), state, group)
            return
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1.0 - group["momentum"])
        direction = torch.lerp(gradient, momentum, group["momentum"]).flatten(1).float()
        size = 0.2 * math.sqrt(max(direction.shape))
        direction = orthogonalised(direction, group["iterations"]).view_as(parameter)
        parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"] * size)


def orthogonalised(matrix: Tensor, iterations: int) -> Tensor:
    """About U V^T for a float32 matrix [m, n] = U S V^T: singular values come to lie between 0.7 and 1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = QUINTIC
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = x.mT if tall else x
    return result


def _adam(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["step"] = 0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["step"] += 1
    beta1, beta2 = group["betas"]
    mean = state["exp_avg"].lerp_(gradient, 1.0 - beta1)
    square = state["exp_avg_sq"].lerp_(gradient.square(), 1.0 - beta2)
    correction1, correction2 = (1.0 - beta ** state["step"] for beta in (beta1, beta2))
    root = square.sqrt().div_(math.sqrt(correction2)).add_(group["eps"])
    parameter.add_((mean / root).to(parameter.dtype), alpha=-group["lr"] / correction1)
