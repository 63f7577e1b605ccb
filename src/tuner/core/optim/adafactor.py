"""Adafactor: second moments kept as row and column means (Shazeer and Stern 2018, arXiv:1804.04235).

Argument names and defaults of the update follow the implementation in transformers, so settings carry over. Two things
differ: ``relative_step`` and ``scale_parameter`` are off unless asked for, so that ``lr`` means lr; and with
``relative_step`` the rate multiplies the relative step instead of being ignored, so ``lr = 1`` is the plain method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tuner.core.optim.base import ParameterWise


class Adafactor(ParameterWise):
    """State per matrix: one row and one column vector; per vector: one of its size; ``exp_avg`` only with ``beta1``.

    eps: (added to squared gradients, lowest parameter scale). clip_threshold: largest root mean square of an update.
    decay_rate: exponent of the second moments' decay, beta2(t) = 1 - t**decay_rate. scale_parameter: step sizes
    relative to the parameter's root mean square. relative_step: rate lr*min(1e-2, 1/sqrt(t)); with warmup_init
    lr*min(1e-6*t, 1/sqrt(t)).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = False,
        relative_step: bool = False,
        warmup_init: bool = False,
    ) -> None:
        if warmup_init and not relative_step:
            raise ValueError("warmup_init needs relative_step")
        if isinstance(eps, float | int) or len(eps) != 2:
            raise ValueError("eps takes two numbers; give them as args.eps")
        defaults = {
            "lr": lr,
            "eps": tuple(eps),
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        super().__init__(params, defaults)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        gradient = gradient.float()
        if not state:
            _start(state, gradient, group["beta1"] is not None)
        state["step"] += 1
        weights = parameter.float()
        rate = _rate(weights, state["step"], group)

        keep = 1.0 - math.pow(state["step"], group["decay_rate"])
        direction = gradient * _inverse_root(state, gradient**2 + group["eps"][0], keep)
        direction /= (_rms(direction) / group["clip_threshold"]).clamp(min=1.0)
        direction *= rate
        if group["beta1"] is not None:
            direction = state["exp_avg"].lerp_(direction, 1.0 - group["beta1"])
        parameter.copy_(weights * (1.0 - group["weight_decay"] * rate) - direction)


def _start(state: dict[str, Any], gradient: Tensor, momentum: bool) -> None:
    state["step"] = 0
    if gradient.ndim >= 2:
        state["exp_avg_sq_row"] = gradient.new_zeros(gradient.shape[:-1])
        state["exp_avg_sq_col"] = gradient.new_zeros(gradient.shape[:-2] + gradient.shape[-1:])
    else:
        state["exp_avg_sq"] = torch.zeros_like(gradient)
    if momentum:
        state["exp_avg"] = torch.zeros_like(gradient)


def _inverse_root(state: dict[str, Any], squares: Tensor, keep: float) -> Tensor:
    """1/sqrt of the running second moment, after taking ``squares`` into it."""
    if squares.ndim < 2:
        moment: Tensor = state["exp_avg_sq"].lerp_(squares, 1.0 - keep)
        return moment.rsqrt()
    rows = state["exp_avg_sq_row"].lerp_(squares.mean(dim=-1), 1.0 - keep)
    columns = state["exp_avg_sq_col"].lerp_(squares.mean(dim=-2), 1.0 - keep)
    share = rows / rows.mean(dim=-1, keepdim=True)
    inverse: Tensor = share.rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)
    return inverse


def _rate(weights: Tensor, step: int, group: dict[str, Any]) -> Tensor | float:
    rate: float = group["lr"]
    if group["relative_step"]:
        limit = 1e-6 * step if group["warmup_init"] else 1e-2
        rate *= min(limit, 1.0 / math.sqrt(step))
    if group["scale_parameter"]:
        return _rms(weights).clamp(min=group["eps"][1]) * rate
    return rate


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
