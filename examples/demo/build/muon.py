"""A small Muon for training from scratch: orthogonalised momentum for matrices, Adam for the rest.

The update of Keller Jordan et al. (2024), with the quintic Newton-Schulz iteration and the scale
0.2 * sqrt(max(rows, columns)) that lets one learning rate serve both halves.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly the closest semi-orthogonal matrix to `matrix` [..., rows, columns], by five quintic steps."""
    # bfloat16 is the published choice, and five times faster where the CPU has it.
    x = (matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    turned = x.shape[-2] > x.shape[-1]
    if turned:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if turned else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum 0.95 (Nesterov) and orthogonalisation for parameters of two or more axes."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})
        # Same-shape matrices share one batched iteration: many tiny products are slow on a CPU.
        self._stacks: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in self.param_groups[0]["params"]:
            key = (parameter.shape[0], parameter[0].numel())
            self._stacks.setdefault(key, []).append(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients in place."""
        group = self.param_groups[0]
        for (rows, columns), members in self._stacks.items():
            members = [member for member in members if member.grad is not None]
            if not members:
                continue
            updates = []
            for member in members:
                state = self.state[member]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(member)
                buffer = state["momentum"]
                buffer.lerp_(member.grad, 1 - group["momentum"])
                updates.append(member.grad.lerp(buffer, group["momentum"]).reshape(rows, columns))
            scale = 0.2 * max(rows, columns) ** 0.5
            for member, update in zip(members, orthogonal(torch.stack(updates)), strict=True):
                member.add_(update.reshape(member.shape), alpha=-group["lr"] * scale)


class Pair:
    """Muon for the matrices named by `is_matrix`, Adam for all other parameters, one learning-rate factor."""

    def __init__(self, module: nn.Module, *, matrix_lr: float, other_lr: float) -> None:
        matrices, others = [], []
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 1 and "embed." not in name
            (matrices if hidden else others).append(parameter)
        self.parts = [(Muon(matrices, matrix_lr), matrix_lr)]
        if others:
            self.parts.append((torch.optim.Adam(others, other_lr, betas=(0.9, 0.98)), other_lr))

    def step(self, factor: float) -> None:
        """Update with the learning rates times `factor`, then clear the gradients."""
        for optimizer, rate in self.parts:
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
