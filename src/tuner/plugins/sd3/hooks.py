"""The model hooks for SD3. Shapes: B batch, h/w latent size, T text tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tuner.core.adapters.saving import adapter_strings, save_configured
from tuner.core.compute.autoencoder import decode_image, encode_image
from tuner.core.hooks import hookimpl
from tuner.core.types import Models, TextEmbeds

from . import load
from . import text as captioning
from .latents import SCALE, SHIFT
from .positions import PatchEmbed, ScaledTables, training_size
from .sources import resolve

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.rng import Rng
    from tuner.core.types import ModelFacts, Network, Placement

TIMESTEPS = 1000.0
"""The denoiser's own unit: sigma 1 is timestep 1000."""
IMPLEMENTATION = "https://github.com/Stability-AI/sd3.5"


@hookimpl
def load_models(config: RunConfig, facts: ModelFacts, components: Collection[str], placement: Placement) -> Models:
    """Load components; the tokenizers come along with any text encoder, and alone for ``"tokenizers"``."""
    sources, mmap = resolve(config), config.model.mmap
    models = Models()
    if "denoiser" in components:
        attention = config.attention
        models.denoiser = load.load_denoiser(
            sources, placement, backend=attention.backend, split=attention.split, mmap=mmap
        )
        if config.model.scaled_pos_embed:  # type: ignore[attr-defined]
            scale_positions(models.denoiser, config, facts)
    if "vae" in components:
        models.vae = load.load_vae(sources, placement, facts.latent_channels, mmap=mmap)
    for name in ("clip_l", "clip_g"):
        if name in components:
            models.text_encoders[name] = load.load_clip_encoder(sources, name, placement, mmap=mmap)
    if "t5" in components:
        models.text_encoders["t5"] = load.load_t5_encoder(sources, placement, mmap=mmap)
    if {*facts.text_components, "tokenizers"} & set(components):
        models.tokenizers = dict(captioning.load_tokenizers(sources.tokenizers))
    return models


def scale_positions(denoiser: Any, config: RunConfig, facts: ModelFacts) -> None:
    """Give the denoiser one position table per training resolution."""
    embed = _patch_embed(denoiser)
    sizes = {training_size(size, facts.resolution_multiple) for entry in config.data.sets for size in entry.resolution}
    embed.scaled = ScaledTables(embed.proj.out_channels, sizes)


@hookimpl
def encode_text(
    models: Models, config: RunConfig, facts: ModelFacts, captions: Sequence[str], components: Collection[str]
) -> TextEmbeds:
    """Captions to the fields whose encoders are all among ``components``."""
    wanted = [name for name, field in facts.text_fields.items() if set(field.of) <= set(components)]
    return TextEmbeds(tensors=captioning.encode(models, config, facts, captions, wanted) if wanted else {})


@hookimpl
def encode_latents(models: Models, config: RunConfig, pixels: Tensor, rng: Rng | None) -> Tensor:
    """Normalised latents: the posterior's mode, or a sample when ``latents.posterior`` says so and ``rng`` is given."""
    assert models.vae is not None
    sampled = rng if config.latents.posterior == "sample" else None
    return encode_image(models.vae, pixels, sampled, scale=SCALE, shift=SHIFT)


@hookimpl
def decode_latents(models: Models, latents: Tensor) -> Tensor:
    """Pixels [B,3,H,W] of latents [B,C,h,w], clamped to -1..1."""
    assert models.vae is not None
    return decode_image(models.vae, latents, scale=SCALE, shift=SHIFT)


@hookimpl
def predict(
    models: Models, config: RunConfig, noisy: Tensor, timesteps: Tensor, text: TextEmbeds, rng: Rng | None
) -> Tensor:
    """Velocity [B,C,h,w] float32 for noisy [B,C,h,w] at timesteps [B], which are sigmas."""
    denoiser: Any = models.denoiser
    embed = _patch_embed(denoiser)
    dtype = embed.proj.weight.dtype
    states, pooled = captioning.context(text.tensors, denoiser.config.joint_attention_dim)
    embed.corner = random_corner(embed, noisy, config.model.pos_embed_random_crop, rng)  # type: ignore[attr-defined]
    velocity: Tensor = denoiser(
        latents=noisy.to(dtype),
        context=states.to(dtype),
        pooled=pooled.to(dtype),
        timesteps=timesteps.float() * TIMESTEPS,
    )
    return velocity.float()


def random_corner(embed: PatchEmbed, noisy: Tensor, chance: float, rng: Rng | None) -> tuple[int, int] | None:
    """Where this batch reads the position table: None for its centre, as always outside training."""
    if rng is None or chance == 0 or rng.child("crop").random() >= chance:
        return None
    patch = embed.proj.kernel_size[0]
    down, across = embed.room(noisy.shape[-2] // patch, noisy.shape[-1] // patch)
    return rng.child("top").integers(down), rng.child("left").integers(across)


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


VERSIONS = {"medium": "sd3_medium", "3.5-medium": "sd3_5-medium", "3.5-large": "sd3_5-large"}


def own_metadata(config: RunConfig, facts: ModelFacts) -> dict[str, object]:
    """What other programs expect in the header of an adapter of this family, beside the core's strings."""
    noise, encoder = config.noise.resolved(facts.noise), config.text_encoder
    return adapter_strings(config, facts) | {
        "modelspec.implementation": IMPLEMENTATION,
        "ss_base_model_version": VERSIONS[facts.flavour],
        "ss_network_module": "networks.lora_sd3",
        "ss_apply_lg_attn_mask": encoder.mask_padding.get("clip", False),
        "ss_apply_t5_attn_mask": encoder.mask_padding.get("t5", False),
        "ss_training_shift": 1.0 if noise.shift is None else noise.shift,
    }


def _patch_embed(denoiser: Any) -> PatchEmbed:
    embed = denoiser.pos_embed
    assert isinstance(embed, PatchEmbed)
    return embed
