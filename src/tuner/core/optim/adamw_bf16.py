"""AdamW whose two averages are kept in bfloat16: half the state of AdamW, arithmetic in float32."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tuner.core.optim.base import ParameterWise, check_betas
from tuner.core.optim.rounding import fresh_generator, round_stochastic


class AdamWBf16(ParameterWise):
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), with averages that are rounded at random to bfloat16.

    Rounded to the nearest, an average with beta2 = 0.999 would stand still: its change per update is smaller than half
    the distance between two bfloat16 numbers. Random rounding keeps it right on average. The draws follow from the
    update's number and the place of the parameter, so a resumed run repeats them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": check_betas(betas), "eps": eps, "weight_decay": weight_decay})
        numbered = (parameter for group in self.param_groups for parameter in group["params"])
        self._number = {parameter: number for number, parameter in enumerate(numbered)}

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(parameter.shape, dtype=torch.bfloat16, device=parameter.device)
        state["step"] += 1
        gradient = gradient.float()
        mean = state["exp_avg"].float().lerp_(gradient, 1.0 - beta1)
        square = state["exp_avg_sq"].float().lerp_(gradient.square(), 1.0 - beta2)
        generator = fresh_generator(parameter.device, "adamw_bf16", state["step"], self._number[parameter])
        state["exp_avg"] = round_stochastic(mean, generator)
        state["exp_avg_sq"] = round_stochastic(square, generator)
        correction1, correction2 = (1.0 - beta ** state["step"] for beta in (beta1, beta2))
        root = square.sqrt_().div_(math.sqrt(correction2)).add_(group["eps"])
        weights = parameter.float().mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.copy_(weights.addcdiv_(mean, root, value=-group["lr"] / correction1))
