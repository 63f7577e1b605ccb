"""The ``model`` section for Mosaic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from tuner import Ask, ModelConfigBase


class MosaicConfig(ModelConfigBase):
    """One file holds the denoiser and the text encoder."""

    unused = ("subfolder", "revision", "variant", "text_encoders", "tokenizers", "vae", "download_dir")
    family: Literal["mosaic"] = "mosaic"
    """Name of this plugin."""
    lowest_sigma: Annotated[float, Ask(question="Below which noise level do errors count no more?")] = Field(
        0.05, gt=0, lt=1
    )
    """The error of the clean prediction is divided by the noise level, but by no less than this."""
