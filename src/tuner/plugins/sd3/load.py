"""Modules from weight files: built without memory, then filled tensor by tensor in their final dtype and place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.core.compute.autoencoder import load_autoencoder
from tuner.core.compute.dtypes import dtype_by_name
from tuner.core.compute.encoders import load_clip, load_t5, read_settings
from tuner.core.compute.weights import assign, read_tensors
from tuner.core.errors import UsageError
from tuner.core.files import WeightHeader

from .denoiser import JointAttention, build, join_projections
from .names import exchanged, parameter_parts
from .sizes import denoiser_sizes, diffusers_names, original_names

if TYPE_CHECKING:
    from tuner.core.types import Placement

    from .sources import Sources

TABLE = "pos_embed.pos_embed"
EXACT = "time_text_embed.timestep_embedder."
"""Parameters that stay float32."""


def load_denoiser(
    sources: Sources, placement: Placement, *, backend: str = "sdpa", split: bool = False, mmap: bool = True
) -> nn.Module:
    """The diffusion transformer, frozen, under diffusers' names, from either layout.

    The timestep embedder and the position table stay float32, whatever the rest is.
    """
    header, where = sources.denoiser.header(), str(sources.denoiser.path)
    model = build(denoiser_sizes(header, where))
    _fill(model, header, dtype_by_name(placement.dtype("denoiser")), placement.device, where, mmap)
    join_projections(model)
    model.set_attn_processor(JointAttention(backend, split=split))  # type: ignore[operator]
    return model.eval().requires_grad_(False)


def denoiser_tensors(header: WeightHeader, blocks: int, *, mmap: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a denoiser file in either layout under diffusers' names, fused ones cut by rows."""
    names = original_names(header)
    if not names:
        yield from read_tensors(header.renamed(diffusers_names(header)), mmap=mmap)
        return
    for name, tensor in read_tensors(header.renamed(names), mmap=mmap):
        parts = parameter_parts(name) or (name,)
        if exchanged(parts[0].rpartition(".")[0], blocks):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        yield from zip(parts, tensor.chunk(len(parts)), strict=True)


def load_clip_encoder(sources: Sources, name: str, placement: Placement, *, mmap: bool = True) -> nn.Module:
    """``clip_l`` or ``clip_g``, frozen."""
    part = sources.part(name)
    return load_clip(
        part.header(),
        activation="quick_gelu" if name == "clip_l" else "gelu",
        dtype=dtype_by_name(placement.dtype(name)),
        device=placement.device,
        settings={} if part.prefixes else read_settings(part.path),
        mmap=mmap,
        where=str(part.path),
    )


def load_t5_encoder(sources: Sources, placement: Placement, *, mmap: bool = True) -> nn.Module:
    """The T5 encoder, frozen."""
    part = sources.part("t5")
    dtype = dtype_by_name(placement.dtype("t5"))
    return load_t5(part.header(), dtype=dtype, device=placement.device, mmap=mmap, where=str(part.path))


def load_vae(sources: Sources, placement: Placement, channels: int, *, mmap: bool = True) -> nn.Module:
    """The image autoencoder, frozen. UsageError when it makes other latents than the denoiser reads."""
    part, where = sources.vae, str(sources.vae.path)
    dtype = dtype_by_name(placement.dtype("vae"))
    vae: Any = load_autoencoder(part.header(), dtype=dtype, device=placement.device, mmap=mmap, where=where)
    if vae.config.latent_channels != channels:
        raise UsageError(f"this autoencoder makes {vae.config.latent_channels} channels, the denoiser reads {channels}",
                         where=where, fix="set model.vae.path to the autoencoder of SD3")  # fmt: skip
    module: nn.Module = vae
    return module


def _fill(model: Any, header: WeightHeader, dtype: torch.dtype, device: str, where: str, mmap: bool) -> None:
    blocks = len(model.transformer_blocks)
    exact: dict[str, Tensor] = {}

    def parameters() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in denoiser_tensors(header, blocks, mmap=mmap):
            if name == TABLE or name.startswith(EXACT):
                exact[name] = tensor.to(device=device, dtype=torch.float32, copy=True)
            if name != TABLE:
                yield name, tensor

    assign(model, parameters(), dtype=dtype, device=device, where=where)
    model.pos_embed.pos_embed = exact.pop(TABLE)
    for name, value in exact.items():
        # Not a cast of what was assigned: that would keep the rounding.
        model.get_parameter(name).data = value
