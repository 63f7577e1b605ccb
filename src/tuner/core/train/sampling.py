"""One picture from noise: what previews and `tuner sample` share, so that both draw the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.compute.attention import attending
from tuner.core.flow import SAMPLERS, apply_cfg, euler_sigmas, rescale_cfg
from tuner.core.train.prompts import Prompt
from tuner.core.types import ModelFacts, Models, TextEmbeds

if TYPE_CHECKING:
    from tuner.core.registry.facade import ModelFacade


def first_noise(prompt: Prompt, facts: ModelFacts) -> Tensor:
    """The noise [1,C,h,w] float32 that a picture starts from, drawn on the CPU so that devices agree."""
    factor = facts.spatial_factor
    shape = (1, facts.latent_channels, prompt.height // factor, prompt.width // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(prompt.seed))


@torch.no_grad()
def draw_latents(
    model: ModelFacade,
    models: Models,
    prompt: Prompt,
    positive: TextEmbeds,
    negative: TextEmbeds | None,
    *,
    device: torch.device,
    kernel: str | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents [1,C,h,w] float32 on the CPU, drawn by ``models`` as they are now.

    positive, negative: encoded texts [1, ...] on ``device``; negative is needed where ``prompt.cfg`` is above 1.
    kernel: of attention; None for the one that is in use. on_step: gets the number of finished steps.
    """
    noise = first_noise(prompt, model.facts).to(device)
    guidance = None if prompt.guidance is None else torch.full((1,), prompt.guidance, device=device)

    def velocity(noisy: Tensor, sigmas: Tensor) -> Tensor:
        pred = model.predict(models, noisy, sigmas, positive, guidance)
        if prompt.cfg <= 1 or negative is None:
            return pred
        guided = apply_cfg(pred, model.predict(models, noisy, sigmas, negative, guidance), prompt.cfg)
        return rescale_cfg(guided, pred, prompt.cfg_rescale)

    sigmas = euler_sigmas(prompt.steps, prompt.shift, model.facts.sample.schedule)
    with attending(kernel):
        return SAMPLERS[prompt.sampler](velocity, noise, sigmas, on_step=on_step).cpu()
