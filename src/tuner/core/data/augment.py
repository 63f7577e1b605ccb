"""Small random colour changes of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from tuner.core.rng import Rng

CHANCE = 0.33
MAX_HUE = 8 / 180
"""Largest turn of the hue, as a share of the colour circle."""
GAMMA = (0.95, 1.05)


def shift_color(pixels: Tensor, rng: Rng) -> Tensor:
    """With probability 0.33 turn the hue or apply a gamma, half each. pixels: [3,H,W] RGB in 0..1, as is the result."""
    if rng.child("happens").random() >= CHANCE:
        return pixels
    amount = rng.child("amount").random()
    if rng.child("kind").random() < 0.5:
        return turn_hue(pixels, (2 * amount - 1) * MAX_HUE)
    low, high = GAMMA
    return pixels.clamp(0.0, 1.0) ** (low + (high - low) * amount)


def turn_hue(pixels: Tensor, turn: float) -> Tensor:
    """Turn the hue of [3,H,W] RGB in 0..1 by a share of the colour circle; saturation and value stay (HSV)."""
    value, top = pixels.max(dim=0)
    spread = value - pixels.min(dim=0).values
    red, green, blue = pixels
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    sextants = torch.stack(((green - blue) / safe % 6, (blue - red) / safe + 2, (red - green) / safe + 4))
    hue = (sextants.gather(0, top.unsqueeze(0)).squeeze(0) + 6 * turn) % 6
    # Back from HSV: channel = value - spread * max(0, min(k, 4 - k, 1)) with k = (n + hue) mod 6.
    offsets = torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    k = (offsets + hue) % 6
    return value - spread * torch.minimum(k, 4 - k).clamp(0.0, 1.0)
