"""Pixels and latents: the autoencoder of FLUX.1, which Chroma shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from tuner.core.compute.autoencoder import decode_image, encode_image, load_autoencoder
from tuner.core.compute.dtypes import dtype_by_name

if TYPE_CHECKING:
    from tuner.core.rng import Rng
    from tuner.core.types import Placement

    from .sources import Sources

SCALE, SHIFT = 0.3611, 0.1159
"""Latents for the transformer are (z - SHIFT) * SCALE."""


def load_vae(sources: Sources, placement: Placement, *, mmap: bool) -> nn.Module:
    """The frozen autoencoder."""
    return load_autoencoder(
        sources.header("vae"),
        dtype=dtype_by_name(placement.dtype("vae")),
        device=placement.device,
        mmap=mmap,
        where=str(sources.weights["vae"]),
    )


def encode(vae: nn.Module, pixels: Tensor, rng: Rng | None) -> Tensor:
    """Latents [B,16,H/8,W/8] float32: a sample of the posterior, or its mode when ``rng`` is None."""
    return encode_image(vae, pixels, rng, scale=SCALE, shift=SHIFT)


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Pixels [B,3,H,W] float32 in -1..1."""
    return decode_image(vae, latents, scale=SCALE, shift=SHIFT)
