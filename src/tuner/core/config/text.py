"""``text_encoder`` and ``latents``: how captions and pixels are encoded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tuner.core.config.base import Count, Section


class TextEncoderConfig(Section):
    """How captions are encoded."""

    max_tokens: dict[str, Count] = Field(default_factory=dict)
    """Token limit by tokenizer; longer captions are cut. Left out: the model's own limit."""


class LatentsConfig(Section):
    """How pixels are encoded."""

    posterior: Literal["sample", "mode"] | None = None
    """Draw latents from the autoencoder's posterior, or take its mode. Left out: the model's own choice."""
    chunk_size: Count | None = None
    """Rows per band of the autoencoder's convolutions: less memory, same result. Left out: whole images."""
