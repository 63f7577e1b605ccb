"""The ``model`` section for FLUX.1 and Chroma."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuner.core.config import ComponentSource, ModelConfigBase
from tuner.core.types import Ask


class FluxConfig(ModelConfigBase):
    """Which FLUX.1 (dev, schnell) or Chroma weights to use.

    One folder in the diffusers layout is enough, or one all-in-one file; other single files need
    ``text_encoders`` and ``vae`` too. Chroma has no CLIP.
    """

    family: Literal["flux"] = "flux"
    """Name of this plugin."""
    flavour: Annotated[
        Literal["dev", "schnell", "chroma"] | None,
        Ask(question="Which model is it: FLUX.1 dev, FLUX.1 schnell or Chroma?", when="missing"),
    ] = None
    """Variant of the model. Read from the weights when left out; an error when the weights say otherwise."""
    text_encoders: Annotated[
        dict[Literal["clip_l", "t5"], ComponentSource],
        Ask(question="Where is the text encoder {name} (a file or a folder)?", when="missing"),
    ] = Field(default_factory=dict)  # type: ignore[assignment]
    """``clip_l``: CLIP ViT-L's text encoder; ``t5``: the T5 v1.1 XXL encoder. A file or a folder each."""
    tokenizers: Annotated[
        dict[Literal["clip_l", "t5"], ComponentSource],
        Ask(question="Where is the {name} tokenizer (a folder with tokenizer.json)?", when="missing"),
    ] = Field(default_factory=dict)  # type: ignore[assignment]
    """``clip_l``, ``t5``: tokenizer folders. Left out: beside the text encoders, else fetched from the hub
    once."""
