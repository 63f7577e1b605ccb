"""Which device a run uses, and its allocator."""

from __future__ import annotations

import os

import torch

from tuner.core.errors import UsageError


def empty_cache(device: torch.device) -> None:
    """Give memory that torch's allocator holds unused back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


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
