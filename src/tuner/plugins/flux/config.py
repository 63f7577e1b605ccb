"""The ``model`` section for FLUX.1 and Chroma."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tuner.core.config import ComponentSource, ModelConfigBase


class FluxConfig(ModelConfigBase):
    """Which FLUX.1 (dev, schnell) or Chroma weights to use.

    One folder in the diffusers layout is enough, or one all-in-one file; other single files need
    ``text_encoders`` and ``vae`` too. Chroma has no CLIP.
    """

    family: Literal["flux"] = "flux"
    """Name of this plugin."""
    flavour: Literal["dev", "schnell", "chroma"] | None = None
    """Variant of the model. Read from the weights when left out; an error when the weights say otherwise."""
    text_encoders: dict[Literal["clip_l", "t5"], ComponentSource] = Field(default_factory=dict)  # type: ignore[assignment]
    """``clip_l``: CLIP ViT-L's text encoder; ``t5``: the T5 v1.1 XXL encoder. A file or a folder each."""
    tokenizers: dict[Literal["clip_l", "t5"], ComponentSource] = Field(default_factory=dict)  # type: ignore[assignment]
    """``clip_l``, ``t5``: tokenizer folders. Left out: beside the text encoders, else fetched from the hub
    once."""
