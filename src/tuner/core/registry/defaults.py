"""The core's own implementations of the hooks that a model need not write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.core.hooks import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts, Models, Network, NoiseTarget


@hookimpl(trylast=True)
def noise_target(latents: Tensor, noise: Tensor, sigmas: Tensor) -> NoiseTarget:
    """Rectified flow for latents and noise [B,C,h,w] at sigmas [B], unless the model has a hook of its own."""
    from tuner.core.flow.objective import rectified_flow

    return rectified_flow(latents, noise, sigmas)


@hookimpl(trylast=True)
def build_network(models: Models, config: RunConfig, facts: ModelFacts) -> Network:
    """An adapter chosen by the facts and ``config.network``, or the weights themselves."""
    if config.train.mode == "full":
        from tuner.core.adapters.weights import train_weights

        return train_weights(models, config, facts)
    from tuner.core.adapters.lora import inject_lora

    return inject_lora(models, config, facts)
