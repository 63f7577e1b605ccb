"""The model hooks for Anima. Shapes: B batch, h/w latent size, L tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from tuner.core.adapters.saving import adapter_strings, save_configured
from tuner.core.hooks import hookimpl
from tuner.core.types import Models, TextEmbeds

from . import load
from .facts import CONTEXT_FLOOR
from .latents import VAE
from .sources import resolve
from .text import CaptionTokenizer, LLMAdapter, encode_states, load_tokenizer

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.rng import Rng
    from tuner.core.types import ModelFacts, Network, Placement

IMPLEMENTATION = "https://huggingface.co/circlestone-labs/Anima"


@hookimpl
def load_models(config: RunConfig, components: Collection[str], placement: Placement) -> Models:
    """Load components; both tokenizers come along with any text component, and alone for ``"tokenizers"``."""
    sources = resolve(config)
    mmap = config.model.mmap
    models = Models()
    if "denoiser" in components:
        models.denoiser = load.load_denoiser(sources, placement, mmap=mmap)
        models.denoiser.set_attention(config.attention.backend, config.attention.split)
    if "vae" in components:
        models.vae = load.load_vae(sources, placement, band_rows=config.latents.chunk_size, mmap=mmap)
    if "qwen3" in components:
        models.text_encoders["qwen3"] = load.load_encoder(sources, placement, mmap=mmap)
    if "llm_adapter" in components:
        models.text_encoders["llm_adapter"] = load.load_adapter(sources, placement, mmap=mmap)
    if {"qwen3", "llm_adapter", "tokenizers"} & set(components):
        models.tokenizers = {name: load_tokenizer(name, path) for name, path in sources.tokenizers.items()}
    return models


@hookimpl
def encode_text(models: Models, facts: ModelFacts, captions: Sequence[str], components: Collection[str]) -> TextEmbeds:
    """Captions to the adapter's output, or to what the adapter reads when something on the text side trains."""
    wanted = {name for name, field in facts.text_fields.items() if set(field.of) <= set(components)}
    if not wanted:
        return TextEmbeds(tensors={})
    source_ids, source_mask = _tokens(models, facts, "qwen3", captions)
    ids, mask = _tokens(models, facts, "t5", captions)
    encoder = models.text_encoders["qwen3"]
    states = encode_states(encoder, source_ids, source_mask)
    device = states.device
    fields = {
        "qwen3": states,
        "qwen3_mask": source_mask.to(device),
        "t5_ids": ids.to(device),
        "t5_mask": mask.to(device),
    }
    if "context" in wanted:
        adapter = _adapter(models)
        device = adapter.embed.weight.device
        inputs = [fields[name].to(device) for name in ("qwen3", "qwen3_mask", "t5_ids", "t5_mask")]
        fields |= {"context": adapter(*inputs), "context_mask": mask.to(device)}
    return TextEmbeds(tensors={name: fields[name] for name in facts.text_fields if name in wanted})


@hookimpl
def encode_latents(models: Models, config: RunConfig, pixels: Tensor, rng: Rng | None) -> Tensor:
    """Normalised latents: the posterior's mode, or a sample when ``latents.posterior`` says so and ``rng`` is given."""
    vae = _vae(models)
    pixels = pixels.to(vae.latent_mean.device)
    if rng is None or config.latents.posterior != "sample":
        return vae.encode(pixels)
    batch, _, height, width = pixels.shape
    return vae.encode(pixels, noise=rng.normal((batch, vae.latent_mean.shape[1], height // 8, width // 8)))


@hookimpl
def decode_latents(models: Models, latents: Tensor) -> Tensor:
    """Pixels [B,3,H,W] of latents [B,C,h,w], clamped to -1..1."""
    vae = _vae(models)
    return vae.decode(latents.to(vae.latent_mean.device))


@hookimpl
def predict(models: Models, noisy: Tensor, timesteps: Tensor, text: TextEmbeds) -> Tensor:
    """Velocity [B,C,h,w] for noisy [B,C,h,w] at timesteps [B] (sigma itself).

    The context comes from ``text`` when it is there, else from the adapter in this step, with grad when that or the
    encoder trains. It is padded with zero rows to the length that the denoiser was trained on.
    """
    assert models.denoiser is not None
    fields = text.tensors
    if "context" in fields:
        context, mask = fields["context"], fields["context_mask"]
    else:
        mask = fields["t5_mask"]
        context = _adapter(models)(fields["qwen3"], fields["qwen3_mask"], fields["t5_ids"], mask)
    missing = max(CONTEXT_FLOOR - context.shape[1], 0)
    context, mask = F.pad(context, (0, 0, 0, missing)), F.pad(mask, (0, missing))
    prediction: Tensor = models.denoiser(noisy, timesteps, context, context_mask=mask)
    return prediction


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
    noise = config.noise.resolved(facts.noise)
    return adapter_strings(config, facts) | {
        "modelspec.implementation": IMPLEMENTATION,
        "ss_network_module": "networks.lora_anima",
        "ss_timestep_sampling": noise.timesteps,
        "ss_sigmoid_scale": noise.sigmoid_scale,
        "ss_discrete_flow_shift": facts.noise.shift if noise.shift is None else noise.shift,
    }


def _tokens(models: Models, facts: ModelFacts, name: str, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    tokenizer: CaptionTokenizer = models.tokenizers[name]
    return tokenizer(captions, facts.max_tokens[name])


def _adapter(models: Models) -> LLMAdapter:
    adapter = models.text_encoders["llm_adapter"]
    assert isinstance(adapter, LLMAdapter)
    return adapter


def _vae(models: Models) -> VAE:
    assert isinstance(models.vae, VAE)
    return models.vae
