"""Which device and which dtypes a run uses."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from tuner.core.compute.dtypes import dtype_by_name
from tuner.core.errors import UsageError
from tuner.core.types import Placement

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts


def pick_device() -> torch.device:
    """The first CUDA device, else Apple's, else the CPU. Raises UsageError under a multi-process launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "training with several processes is not built yet",
            where="the WORLD_SIZE environment variable",
            fix="start one process without torchrun or accelerate launch",
        )
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def placement_for(config: RunConfig, facts: ModelFacts, components: Iterable[str], device: torch.device) -> Placement:
    """Dtypes of ``components``: the denoiser and what it needs in a step by ``precision``, the rest by its own rule."""
    precision = config.precision
    frozen = precision.frozen or precision.compute
    dtypes: dict[str, str] = {}
    for name in components:
        if name == "vae":
            dtypes[name] = _long(precision.vae or facts.dtypes.vae)
        elif name in precision.text_encoder:
            dtypes[name] = _long(precision.text_encoder[name])
        elif name in facts.text_components:
            dtypes[name] = _long(facts.dtypes.text)
        else:
            dtypes[name] = _long(frozen)
    return Placement(device=str(device), dtypes=dtypes)


def _long(name: str) -> str:
    return str(dtype_by_name(name)).removeprefix("torch.")
