"""The loss of an update by source and by noise level: where a run learns, and where it does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tuner.core.types import Batch

BANDS = ((0, 250), (250, 500), (500, 750), (750, 1000))
"""Ranges of timesteps."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Mean losses of the samples of an update by source, and by band of timesteps; only of those that it had."""

    by_source: Mapping[str, float] = field(default_factory=dict)
    by_timestep: Mapping[str, float] = field(default_factory=dict)

    def named(self) -> dict[str, float]:
        """As numbers for trackers."""
        return {
            **{f"loss_by_source/{name}": loss for name, loss in self.by_source.items()},
            **{f"loss_by_timestep/{name}": loss for name, loss in self.by_timestep.items()},
        }


def break_down(seen: Sequence[tuple[Batch, Tensor, Tensor]]) -> Breakdown:
    """seen: micro-batches with their losses [B] and sigmas [B]."""
    losses = torch.cat([losses.float() for _, losses, _ in seen]).tolist()
    sigmas = torch.cat([sigmas.float() for _, _, sigmas in seen]).tolist()
    sources = [item.source for batch, _, _ in seen for item in batch.items]
    return Breakdown(_means(zip(sources, losses, strict=True)), _means(zip(map(_band, sigmas), losses, strict=True)))


def _band(sigma: float) -> str:
    low, high = next((band for band in BANDS if sigma * 1000 < band[1]), BANDS[-1])
    return f"{low}-{high}"


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for name, loss in pairs:
        found.setdefault(name, []).append(loss)
    return {name: sum(losses) / len(losses) for name, losses in sorted(found.items())}
