"""The model hooks for FLUX.1 and Chroma. Shapes: B batch, h/w latent size, L tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.saving import adapter_strings, save_configured
from tuner.core.hooks import hookimpl
from tuner.core.types import Models, TextEmbeds

from . import latents as autoencoder
from .denoiser import pack, set_attention, unpack
from .facts import masks_t5
from .load import load_denoiser
from .sizes import PATCH
from .sources import resolve
from .text import clip_pooled, encode_t5, load_encoder, load_tokenizers

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.rng import Rng
    from tuner.core.types import ModelFacts, Network, Placement

IMPLEMENTATION = "https://github.com/black-forest-labs/flux"
BASE_VERSIONS = {"dev": "flux1", "schnell": "flux1", "chroma": "chroma"}
"""What other programs call the base model of an adapter."""


@hookimpl
def load_models(config: RunConfig, facts: ModelFacts, components: Collection[str], placement: Placement) -> Models:
    """Load components; the tokenizers come along with any text encoder, and alone for ``"tokenizers"``."""
    sources = resolve(config)
    mmap = config.model.mmap
    models = Models()
    if "denoiser" in components:
        where = str(sources.weights["denoiser"])
        models.denoiser = load_denoiser(sources.header("denoiser"), placement, mmap=mmap, where=where)
        set_attention(models.denoiser, config.attention.backend, split=config.attention.split)
    if "vae" in components:
        models.vae = autoencoder.load_vae(sources, placement, mmap=mmap)
    for name in facts.text_components:
        if name in components:
            models.text_encoders[name] = load_encoder(sources, name, placement, mmap=mmap)
    if {*facts.text_components, "tokenizers"} & set(components):
        models.tokenizers = dict(load_tokenizers(sources))
    return models


@hookimpl
def encode_text(
    models: Models, config: RunConfig, facts: ModelFacts, captions: Sequence[str], components: Collection[str]
) -> TextEmbeds:
    """Captions to the fields that come from ``components``."""
    fields: dict[str, Tensor] = {}
    if "t5" in components:
        fields["t5"], fields["t5_mask"] = encode_t5(
            models.text_encoders["t5"],
            models.tokenizers["t5"],
            captions,
            facts.max_tokens["t5"],
            masked=masks_t5(config, facts.flavour),
            zero_padding=config.text_encoder.zero_padding,
            chroma=facts.flavour == "chroma",
        )
    if "clip_l" in components and "clip_l" in facts.text_components:
        fields["clip_pooled"] = clip_pooled(
            models.text_encoders["clip_l"], models.tokenizers["clip_l"], captions, facts.max_tokens["clip_l"]
        )
    return TextEmbeds(tensors={name: fields[name] for name in facts.text_fields if name in fields})


@hookimpl
def encode_latents(models: Models, config: RunConfig, pixels: Tensor, rng: Rng | None) -> Tensor:
    """Normalised latents: a posterior sample when ``rng`` is given and wanted, else the mode."""
    assert models.vae is not None
    return autoencoder.encode(models.vae, pixels, rng if config.latents.posterior != "mode" else None)


@hookimpl
def decode_latents(models: Models, latents: Tensor) -> Tensor:
    """Pixels [B,3,H,W] of latents [B,C,h,w], clamped to -1..1."""
    assert models.vae is not None
    return autoencoder.decode(models.vae, latents)


@hookimpl
def predict(
    models: Models,
    config: RunConfig,
    facts: ModelFacts,
    noisy: Tensor,
    timesteps: Tensor,
    text: TextEmbeds,
    guidance: Tensor | None,
) -> Tensor:
    """Velocity [B,C,h,w] for noisy [B,C,h,w] at timesteps [B] (sigma itself)."""
    denoiser = models.denoiser
    assert denoiser is not None
    fields, device = text.tensors, noisy.device
    dtype = denoiser.get_parameter("x_embedder.weight").dtype
    grid = (noisy.shape[2] // PATCH, noisy.shape[3] // PATCH)
    inputs: dict[str, object] = {"grid": grid}
    if masks_t5(config, facts.flavour):
        inputs["text_mask"] = fields["t5_mask"].to(device)
    if facts.flavour != "chroma":
        inputs["pooled"] = fields["clip_pooled"].to(device, dtype)
    if facts.guidance_input:
        value = facts.sample.guidance if guidance is None else guidance
        inputs["guidance"] = torch.as_tensor(value, dtype=torch.float32, device=device).expand(noisy.shape[0])
    tokens = denoiser(pack(noisy).to(dtype), fields["t5"].to(device, dtype), timesteps.float().to(device), **inputs)
    return unpack(tokens.float(), grid)


@hookimpl
def save(
    config: RunConfig,
    facts: ModelFacts,
    network: Network,
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
) -> list[Path]:
    """One safetensors file in ``checkpoint.format``."""
    return save_configured(tensors, config, facts, path, metadata, own_metadata(config, facts))


def own_metadata(config: RunConfig, facts: ModelFacts) -> dict[str, object]:
    """What other programs expect in the header of an adapter of this family, beside the core's strings."""
    noise, loss = config.noise.resolved(facts.noise), config.loss
    values = adapter_strings(config, facts) | {
        "modelspec.implementation": IMPLEMENTATION,
        "ss_base_model_version": BASE_VERSIONS[facts.flavour],
        "ss_model_type": "chroma" if facts.flavour == "chroma" else "flux",
        "ss_network_module": "networks.lora_flux",
        "ss_apply_t5_attn_mask": masks_t5(config, facts.flavour),
        "ss_timestep_sampling": noise.timesteps,
        "ss_sigmoid_scale": noise.sigmoid_scale,
        "ss_discrete_flow_shift": facts.noise.shift if noise.shift is None else noise.shift,
        "ss_model_prediction_type": "sigma_scaled" if loss.target == "clean" else loss.prediction,
    }
    if facts.guidance_input:
        values["ss_guidance_scale"] = config.guidance.embedded
    return values
