"""``text_encoder`` and ``latents``: how captions and pixels are encoded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuner.core.config.base import Count, Section, Share


class TextEncoderConfig(Section):
    """How captions are encoded."""

    max_tokens: dict[str, Count] = Field(default_factory=dict)
    """Token limit by tokenizer; longer captions are cut. Left out: the model's own limit."""
    device: dict[str, Literal["accelerator", "cpu"]] = Field(default_factory=dict)
    """By text encoder: where captions are encoded ahead. ``cpu`` is slow, and needs no memory of a GPU. Left out: the
    accelerator."""
    mask_padding: dict[str, bool] = Field(default_factory=dict)
    """By the model's names: hide padding tokens from attention. Pictures must then be made the same way."""
    zero_padding: bool = False
    """Replace encodings of padding tokens by zeros where the model reads them."""
    dropout: dict[str, Share] = Field(default_factory=dict)
    """By text encoder: chance per sample that its whole encoding is zeros in a training step."""
    unconditional: dict[str, Literal["empty_string", "zero"]] = Field(default_factory=dict)
    """By text encoder: what an empty caption becomes, its encoding or zeros. Left out: its encoding."""


class LatentsConfig(Section):
    """How pixels are encoded."""

    posterior: Literal["sample", "mode"] | None = None
    """Draw latents from the autoencoder's posterior, or take its mode. Left out: the model's own choice."""
    chunk_size: Count | None = None
    """Rows per band of the autoencoder's convolutions: less memory, same result. Left out: whole images."""
    tiling: Annotated[int, Field(ge=64)] | None = None
    """Edge in pixels of overlapping tiles that larger pictures are encoded and decoded in: the memory of a tile, for
    values that differ a little. 512 is usual. Where the posterior is sampled every tile draws for itself, so there is a
    little less noise in the overlap. Left out: whole images."""
