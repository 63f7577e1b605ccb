"""The ``model`` section for Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuner.core.config import ComponentSource, ModelConfigBase
from tuner.core.types import Ask

Share = Annotated[float, Field(ge=0, le=1)]


class SD3Config(ModelConfigBase):
    """Which weights to use, and the position table.

    An all-in-one file or one folder in the diffusers layout is enough; what is named beside it wins.
    """

    family: Literal["sd3"] = "sd3"
    """Name of this plugin."""
    flavour: Annotated[
        Literal["medium", "3.5-medium", "3.5-large"] | None,
        Ask(question="Which model is it: SD3 medium, SD3.5 medium or SD3.5 large?", when="missing"),
    ] = None
    """Variant of the model. Read from the weights when left out; an error when the weights say otherwise."""
    text_encoders: Annotated[
        dict[Literal["clip_l", "clip_g", "t5"], ComponentSource],
        Ask(
            question="Where is the text encoder {name} (a file or a folder)?",
            when="missing",
            optional=("t5",),
        ),
    ] = Field(default_factory=dict)  # type: ignore[assignment]
    """``clip_l``, ``clip_g``, ``t5``: a file or folder each, where ``path`` does not bring them. Without a T5 its
    part of the text is zeros."""
    tokenizers: Annotated[
        dict[Literal["clip", "t5"], ComponentSource],
        Ask(question="Where is the {name} tokenizer (a folder with tokenizer.json)?", when="missing"),
    ] = Field(default_factory=dict)  # type: ignore[assignment]
    """``clip``, ``t5``: tokenizer folders. Left out: beside the weights, else fetched from the hub once."""
    scaled_pos_embed: bool = False
    """Use a position table for each training resolution that spans the same range; for 3.5 medium only."""
    pos_embed_random_crop: Share = 0.0
    """Chance that a training step reads a random window of the position table, not its centre; 3.5 medium only."""
