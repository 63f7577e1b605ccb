"""Sampling along the flow: float32 schedule, float32 latents, whatever dtype the model runs in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from tuner.core.flow.sigmas import TABLE_SIZE, apply_shift

if TYPE_CHECKING:
    from torch import Tensor

Velocity = Callable[["Tensor", "Tensor"], "Tensor"]
"""(noisy [B,C,h,w] float32, sigmas [B] float32) -> velocity [B,C,h,w], any float dtype."""


def euler_sigmas(steps: int, shift: float, schedule: str = "linear") -> Tensor:
    """Noise levels [steps + 1] float32 from exactly 1 to exactly 0: linear points, then the shift formula.

    schedule: ``linear`` spaces the points down to 0; ``table`` down to 0.001 after the shift, with 0 as a last point of
    its own, as `FlowMatchEulerDiscreteScheduler` of diffusers does with a static shift.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, not {steps}")
    if schedule == "table":
        lowest = shift / TABLE_SIZE / (1.0 + (shift - 1.0) / TABLE_SIZE)
        points = torch.linspace(1.0, lowest, steps, dtype=torch.float32)
        sigmas = torch.cat([apply_shift(points, shift), torch.zeros(1)])
    else:
        sigmas = apply_shift(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32), shift)
    sigmas[0], sigmas[-1] = 1.0, 0.0
    return sigmas


def euler_sample(
    predict: Velocity, noise: Tensor, sigmas: Tensor, *, on_step: Callable[[int], None] | None = None
) -> Tensor:
    """Latents [B,C,h,w] float32 after integrating from ``noise`` [B,C,h,w] over ``sigmas`` [K + 1], falling to 0.

    x += (next sigma - sigma) * predict(x, sigma). ``on_step`` is called with the number of finished steps. Use
    `apply_cfg` inside ``predict`` for guidance.
    """
    latents = noise.to(torch.float32) * sigmas[0].item()
    for index in range(len(sigmas) - 1):
        here, there = sigmas[index], sigmas[index + 1]
        batch_sigmas = here.to(latents.device).expand(latents.shape[0])
        velocity = predict(latents, batch_sigmas).to(torch.float32)
        latents = latents + (there - here).item() * velocity
        if on_step is not None:
            on_step(index + 1)
    return latents


def heun_sample(
    predict: Velocity, noise: Tensor, sigmas: Tensor, *, on_step: Callable[[int], None] | None = None
) -> Tensor:
    """As `euler_sample`, with the mean of the velocities at both ends of a step: two predictions per step.

    The last step ends at 0, where models are hardly trained, so it is Euler's. Karras et al. 2022, algorithm 1.
    """
    latents = noise.to(torch.float32) * sigmas[0].item()
    for index in range(len(sigmas) - 1):
        here, there = (each.to(latents.device).expand(latents.shape[0]) for each in sigmas[index : index + 2])
        length = (sigmas[index + 1] - sigmas[index]).item()
        velocity = predict(latents, here).to(torch.float32)
        if sigmas[index + 1] > 0:
            velocity = (velocity + predict(latents + length * velocity, there).to(torch.float32)) / 2
        latents = latents + length * velocity
        if on_step is not None:
            on_step(index + 1)
    return latents


SAMPLERS: Mapping[str, Callable[..., Tensor]] = {"euler": euler_sample, "heun": heun_sample}
"""Values of ``sample.sampler``."""


def apply_cfg(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in float32: negative + scale*(positive - negative)."""
    negative = negative.to(torch.float32)
    return negative + scale * (positive.to(torch.float32) - negative)


def rescale_cfg(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """``guided`` with its standard deviation brought towards that of ``positive``, per sample, in float32.

    share: 0 leaves it as it is, 1 makes both equal. Lin et al. 2024 (arXiv:2305.08891), section 3.4.
    """
    if share == 0.0:
        return guided
    axes = tuple(range(1, guided.ndim))
    factor = positive.to(torch.float32).std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return guided * (share * factor + (1.0 - share))
