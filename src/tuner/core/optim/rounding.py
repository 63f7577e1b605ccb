"""Rounding float32 to bfloat16 so that small changes are not lost."""

from __future__ import annotations

import torch
from torch import Tensor

from tuner.core.rng import Rng


def fresh_generator(device: torch.device, *path: str | int) -> torch.Generator:
    """A generator on ``device`` whose draws follow from ``path`` alone."""
    key = Rng(0, "rounding", *path).key()
    return torch.Generator(device).manual_seed(key % (1 << 63))


def round_stochastic(values: Tensor, generator: torch.Generator) -> Tensor:
    """``values`` float32 to bfloat16, up or down with chances that make the mean exact.

    bfloat16 is the upper half of a float32: a uniform number of 16 bits is added to the lower half, which is then cut
    off. Infinities and NaN stay what they are.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def round_kahan(values: Tensor) -> tuple[Tensor, Tensor]:
    """``values`` float32 as two bfloat16 tensors whose sum has 16 bits of mantissa: the nearest, and what it lacks."""
    rounded = values.to(torch.bfloat16)
    rest = torch.where(rounded.isfinite(), values - rounded.float(), 0.0)
    return rounded, rest.to(torch.bfloat16)
