"""The ``model`` section for Anima."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tuner.core.config import ComponentSource, ModelConfigBase


class AnimaConfig(ModelConfigBase):
    """Which Anima weights to use.

    One folder or hub id in the diffusers layout is enough; single files need ``text_encoders.qwen3`` and ``vae`` too.
    """

    family: Literal["anima"] = "anima"
    """Name of this plugin."""
    text_encoders: dict[Literal["qwen3"], ComponentSource] = Field(default_factory=dict)  # type: ignore[assignment]
    """``qwen3``: the Qwen3-0.6B folder, or one file with or without ``model.`` prefix."""
    tokenizers: dict[Literal["qwen3", "t5"], ComponentSource] = Field(default_factory=dict)  # type: ignore[assignment]
    """``qwen3``, ``t5``: tokenizer folders. Left out: beside the text encoder, else fetched from the hub once."""
    llm_adapter: ComponentSource | None = None
    """A file with adapter weights; wins over the adapter inside the denoiser's file."""
