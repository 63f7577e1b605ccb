"""Rectified flow: the noisy input, the velocity target, and the two ways to disturb the noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tuner.core.config import steps_of
from tuner.core.types import NoiseTarget

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.core.config import InputPerturbation, NoiseOffset


def rectified_flow(latents: Tensor, noise: Tensor, sigmas: Tensor) -> NoiseTarget:
    """noisy = (1 - sigma)*latents + sigma*noise; target = noise - latents; timesteps = sigmas; weight 1.

    latents, noise [B,C,h,w]; sigmas [B] in 0..1. Everything returned is float32, because sigma loses too much in
    bfloat16 near 1.
    """
    latents, noise, sigmas = latents.to(torch.float32), noise.to(torch.float32), sigmas.to(torch.float32)
    share = per_sample(sigmas, latents)
    noisy = (1.0 - share) * latents + share * noise
    return NoiseTarget(
        noisy=noisy, target=noise - latents, sigmas=sigmas, timesteps=sigmas, weight=torch.ones_like(sigmas)
    )


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] reshaped to [B,1,...] so that it multiplies ``like`` [B,...]."""
    return values.reshape([-1] + [1] * (like.ndim - 1))


def offset_noise(
    offset: NoiseOffset, noise: Tensor, latents: Tensor, *, normal: Tensor, strength: Tensor, chance: Tensor
) -> Tensor:
    """Noise [B,C,h,w] plus one random constant per sample and channel; input and target both use the result.

    amount = strength (times a uniform draw when random) + adaptive*|mean of the channel's latents|, never below 0.
    normal [B,C]: standard normal draws. strength [B]: uniform draws for ``random``. chance [B]: uniform draws; a sample
    is changed where its draw is below ``probability``. Formula: `apply_noise_offset` of kohya-ss/sd-scripts.
    """
    base = torch.full_like(strength, offset.strength)
    if offset.random:
        base = base * strength
    amount = base[:, None]
    if offset.adaptive:
        amount = (amount + offset.adaptive * latents.mean(dim=(2, 3)).abs()).clamp(min=0.0)
    changed = (chance < offset.probability).to(noise.dtype)
    constant: Tensor = changed[:, None] * amount * normal
    return noise + constant[:, :, None, None]


def perturb_noise(
    perturbation: InputPerturbation, noise: Tensor, *, normal: Tensor, strength: Tensor, step: int, total: int
) -> Tensor:
    """Noise for the model's input only: noise + gamma*normal. The target keeps the undisturbed noise.

    noise, normal [B,C,h,w]; strength [B]: uniform draws that scale gamma when ``random``; step: updates done so far,
    of ``total``. With ``steps`` gamma fades linearly and is gone after that many updates. Source: input perturbation
    (Ning et al. 2023), fading as in bghira/SimpleTuner.
    """
    gamma = torch.full_like(strength, perturbation.gamma)
    if perturbation.random:
        gamma = gamma * strength
    if perturbation.steps is not None:
        gamma = gamma * fading(step, steps_of(perturbation.steps, total))
    return noise + per_sample(gamma, noise) * normal


def fading(step: int, steps: int) -> float:
    """1 at step 0, falling linearly to 0 at ``steps`` and staying there."""
    return max(0.0, 1.0 - step / steps) if steps > 0 else 0.0
