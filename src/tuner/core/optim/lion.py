"""Lion: the sign of an interpolated momentum, one state tensor per parameter (Chen et al. 2023, arXiv:2302.06675)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch


class Lion(torch.optim.Optimizer):
    """p <- p*(1 - lr*weight_decay) - lr*sign(beta1*m + (1 - beta1)*g), then m <- beta2*m + (1 - beta2)*g.

    Steps have size lr in every element, so use a third to a tenth of an AdamW rate. State: ``exp_avg`` in the
    parameter's dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), not {betas}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum, gradient = state["exp_avg"], parameter.grad
                direction = torch.lerp(gradient, momentum, beta1).sign_()
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.lerp_(gradient, 1.0 - beta2)
        return loss
