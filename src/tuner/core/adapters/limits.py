"""A limit on how much each low-rank adapter may change its weight, kept after every update.

    n = alpha / rank * |up down|        Frobenius norm of the whole change;  n > limit:  up, down *= sqrt(limit / n)

The rule is that of ``scale_weight_norms`` in kohya-ss/sd-scripts. The product itself is never built:
|up down|^2 = sum((up^T up) * (down down^T)), two matrices of rank x rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.layers import LoraLayer
from tuner.core.adapters.lora import AdapterNetwork

if TYPE_CHECKING:
    from tuner.core.types import Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """Norms of the changes of all modules after limiting: their mean, the largest; how many were scaled down."""

    mean: float
    largest: float
    scaled: int


@torch.no_grad()
def change_norm(layer: LoraLayer) -> Tensor:
    """Norm of what ``layer`` adds to its weight at strength 1, a float32 scalar; linears that share it count as one."""
    down, up = layer.down.float().flatten(1), layer.up.float().flatten(1)
    square = ((up.t() @ up) * (down @ down.t())).sum()
    return square.clamp(min=0).sqrt() * (layer.alpha / layer.rank)


@torch.no_grad()
def limit_norms(network: Network, limit: float) -> Norms:
    """Scale down the factors of every low-rank module whose change is larger than ``limit``, in place.

    One transfer from the device for all modules.
    """
    assert isinstance(network.module, AdapterNetwork)
    layers = [layer for _, layer in network.module.items() if isinstance(layer, LoraLayer)]
    before = [change_norm(layer) for layer in layers]
    for layer, norm in zip(layers, before, strict=True):
        # Exactly 1 for those within the limit, so that they keep every bit.
        root = torch.where(norm > limit, limit / norm, 1.0).sqrt()
        layer.up.mul_(root.to(layer.up.dtype))
        layer.down.mul_(root.to(layer.down.dtype))
    return _told([float(norm) for norm in torch.stack(_together(before)).cpu()], limit)


def _together(norms: Sequence[Tensor]) -> list[Tensor]:
    """On one device: a denoiser and its encoders may be on several."""
    return [norm.to(norms[0].device) for norm in norms]


def _told(before: Sequence[float], limit: float) -> Norms:
    after = [min(norm, limit) for norm in before]
    return Norms(mean=sum(after) / len(after), largest=max(after), scaled=sum(norm > limit for norm in before))
