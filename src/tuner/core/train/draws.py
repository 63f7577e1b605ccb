"""The random numbers of a training step, one stream per sample.

Each draw is keyed by seed, purpose, step and sample, never by its place in a batch: one micro-batch of four and four
of one see the same noise, and so does a resumed run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tuner.core.config import GuidanceConfig, NoiseConfig
from tuner.core.flow import offset_noise, perturb_noise
from tuner.core.rng import Rng
from tuner.core.types import Item


class StepDraws:
    """All draws for ``items`` at ``step``; tensors are float32 on the CPU."""

    def __init__(self, seed: int, step: int, items: Sequence[Item]) -> None:
        self._streams = [Rng(seed, "step", step, item.source, item.id, item.visit) for item in items]

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal [B, *shape]."""
        return torch.stack([stream.child(purpose).normal(shape) for stream in self._streams])

    def uniform(self, purpose: str) -> Tensor:
        """Uniform [B] in [0, 1)."""
        return torch.stack([stream.child(purpose).uniform(()) for stream in self._streams])


def draw_noise(noise_cfg: NoiseConfig, latents: Tensor, draws: StepDraws) -> Tensor:
    """Noise [B,C,h,w] for latents [B,C,h,w] on their device, with ``noise.offset`` when it is on."""
    noise = draws.normal("noise", latents.shape[1:]).to(latents.device, non_blocking=True)
    if noise_cfg.offset is None:
        return noise
    return offset_noise(
        noise_cfg.offset,
        noise,
        latents,
        normal=draws.normal("offset", latents.shape[1:2]).to(latents.device),
        strength=draws.uniform("offset strength").to(latents.device),
        chance=draws.uniform("offset chance").to(latents.device),
    )


def draw_guidance(guidance_cfg: GuidanceConfig, draws: StepDraws) -> Tensor | None:
    """Embedded guidance [B] as ``guidance.embedded`` says; None for a model without that input."""
    embedded = guidance_cfg.embedded
    if embedded is None:
        return None
    chance = draws.uniform("guidance")
    if isinstance(embedded, tuple):
        return embedded[0] + chance * (embedded[1] - embedded[0])
    return torch.full_like(chance, embedded)


def perturbed(noise_cfg: NoiseConfig, noise: Tensor, draws: StepDraws, step: int, total: int) -> Tensor | None:
    """Noise for the model's input only, or None when ``noise.input_perturbation`` is off. ``step`` counts from 1 to
    ``total``.
    """
    perturbation = noise_cfg.input_perturbation
    if perturbation is None:
        return None
    return perturb_noise(
        perturbation,
        noise,
        normal=draws.normal("perturbation", noise.shape[1:]).to(noise.device),
        strength=draws.uniform("perturbation strength").to(noise.device),
        step=step - 1,
        total=total,
    )
