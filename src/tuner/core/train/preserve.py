"""Samples of sources with the role ``preserve``: what they are compared with is the base model's own prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.network import adapter_eval, adapter_strength
from tuner.core.train.empty import Predict
from tuner.core.types import Item, Network, TextEmbeds

if TYPE_CHECKING:
    from tuner.core.config import DataConfig


class Preserved:
    """Finds the samples of such sources in a micro-batch, and asks the base model about them."""

    def __init__(self, data: DataConfig, network: Network) -> None:
        self.network = network
        self.sources = {source.id for each in data.sets for source in each.sources if source.role == "preserve"}

    def targets(
        self,
        items: Sequence[Item],
        predict: Predict,
        noisy: Tensor,
        timesteps: Tensor,
        text: Callable[[], TextEmbeds],
    ) -> tuple[Tensor, Tensor] | None:
        """(which samples are preserved [B,1,1,1], the base's prediction [B,C,h,w]), or None when none is.

        Same noise and caption, adapters at strength 0 in the denoiser and the encoders, no dropout, no gradient. The
        whole micro-batch is computed, so that its size, which compiled blocks depend on, stays the same.
        """
        kept = [item.source in self.sources for item in items]
        if not any(kept):
            return None
        with torch.no_grad(), adapter_strength(self.network, 0.0), adapter_eval(self.network):
            base = predict(noisy, timesteps, text())
        return torch.tensor(kept, device=noisy.device).reshape(-1, 1, 1, 1), base


def with_preserved(target: Tensor, preserved: tuple[Tensor, Tensor] | None) -> Tensor:
    """``target`` [B,C,h,w] with the base's prediction in place of that of the preserved samples."""
    if preserved is None:
        return target
    kept, base = preserved
    return torch.where(kept, base.to(target.dtype), target)
