"""The loss and the gradient of a step that is only looked at: fixed noise, nothing changes, nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.rng import Rng
from tuner.core.types import Batch, Models, Network, TextEmbeds

if TYPE_CHECKING:
    from tuner.core.registry.facade import ModelFacade


def losses_and_gradient(
    facade: ModelFacade,
    models: Models,
    batches: Sequence[Batch],
    parameters: Sequence[Tensor],
    *,
    text: Callable[[Batch], TextEmbeds],
    device: torch.device,
    seed: int,
    nudge: float = 0.0,
) -> tuple[list[float], Tensor]:
    """Mean squared errors of the batches and the summed gradient, one float32 vector. The noise is always the same.

    nudge: relative size of a random change of the noisy latents, for measuring how much rounding of that size matters.
    """
    total = sum(len(batch.items) for batch in batches)
    losses: list[float] = []
    gradient = torch.zeros(sum(parameter.numel() for parameter in parameters), device=device)
    first = 0
    for number, batch in enumerate(batches):
        count = len(batch.items)
        rng = Rng(seed, "parity", number)
        latents = batch.latents.to(device)
        shape = tuple(latents.shape)
        sigmas = ((torch.arange(first, first + count) + 0.5) / total).to(device)
        target = facade.noise_target(latents, rng.normal(shape).to(device), sigmas)
        noisy = target.noisy
        if nudge:
            noisy = noisy * (1 + nudge * rng.child("nudge").normal(shape).to(device))
        prediction = facade.predict(models, noisy, target.timesteps, text(batch), rng=rng.child("model"))
        loss = (prediction.float() - target.target.float()).square().mean()
        parts = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradient += torch.cat(
            [
                (torch.zeros_like(parameter) if part is None else part).flatten().float().to(device)
                for part, parameter in zip(parts, parameters, strict=True)
            ]
        )
        losses.append(float(loss.detach()))
        first += count
    return losses, gradient


def shake(network: Network, seed: int) -> None:
    """Give a fresh network values that act: some of its factors start at zero, and hide mistakes in the others."""
    with torch.no_grad():
        for group in network.param_groups:
            for name, value in group.params.items():
                noise = Rng(seed, "shake", name).normal(tuple(value.shape))
                value.add_(0.05 * noise.to(value.device, value.dtype))
