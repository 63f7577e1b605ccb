"""The ``model`` section for Anima."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuner.core.config import ComponentSource, ModelConfigBase
from tuner.core.types import Ask


class AnimaConfig(ModelConfigBase):
    """Which Anima weights to use.

    One folder or hub id in the diffusers layout is enough; single files need ``text_encoders.qwen3`` and ``vae`` too.
    """

    family: Literal["anima"] = "anima"
    """Name of this plugin."""
    text_encoders: Annotated[
        dict[Literal["qwen3"], ComponentSource],
        Ask(question="Where is the text encoder (Qwen3-0.6B, a folder or a file)?", when="missing"),
    ] = Field(default_factory=dict)  # type: ignore[assignment]
    """``qwen3``: the Qwen3-0.6B folder, or one file with or without ``model.`` prefix."""
    tokenizers: Annotated[
        dict[Literal["qwen3", "t5"], ComponentSource],
        Ask(question="Where is the {name} tokenizer (a folder with tokenizer.json)?", when="missing"),
    ] = Field(default_factory=dict)  # type: ignore[assignment]
    """``qwen3``, ``t5``: tokenizer folders. Left out: beside the text encoder, else fetched from the hub once."""
    llm_adapter: Annotated[
        ComponentSource | None, Ask(question="The model's file has no LLM adapter. Where is it?", when="missing")
    ] = None
    """A file with adapter weights; wins over the adapter inside the denoiser's file."""
