"""The prediction for the empty caption, beside that for the batch's own captions: what guidance starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.core.types import Field, TextEmbeds

if TYPE_CHECKING:
    from tuner.core.config import GuidanceConfig

Predict = Callable[[Tensor, Tensor, TextEmbeds], Tensor]
"""(noisy [B,C,h,w], timesteps [B], text of B captions) -> velocity [B,C,h,w]."""


class EmptyCaption:
    """Runs the model once or twice per micro-batch, as ``guidance.distill`` asks.

    cached: texts to their cached fields [B, ...] on the run's device. live: the same for encoders that run in every
    step. fields: ``ModelFacts.text_fields``.
    """

    def __init__(
        self,
        guidance: GuidanceConfig,
        fields: Mapping[str, Field],
        *,
        cached: Callable[[Sequence[str]], TextEmbeds],
        live: Callable[[Sequence[str]], TextEmbeds],
    ) -> None:
        wanted = guidance.distill
        self.distill = wanted if wanted is not None and wanted.scale != 1 else None
        self.fields, self.cached, self.live = fields, cached, live
        self._stored: TextEmbeds | None = None

    def predict(
        self, predict: Predict, noisy: Tensor, timesteps: Tensor, text: Callable[[], TextEmbeds]
    ) -> tuple[Tensor, Tensor | None]:
        """(prediction with grad, prediction for the empty caption without, or None when nothing needs it).

        Both see the same noise, weights and dropout. The pass of its own comes first: no activation of the other is in
        memory then.
        """
        if self.distill is None:
            return predict(noisy, timesteps, text()), None
        count = noisy.shape[0]
        with torch.no_grad():
            empty = self._text(count)
        if not self.distill.batched:
            with torch.no_grad():
                unconditional = predict(noisy, timesteps, empty)
            return predict(noisy, timesteps, text()), unconditional
        both = stacked(text(), empty, self.fields)
        # Adapter dropout is drawn per sample, and row b + count belongs to sample b.
        velocity = predict(torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), both)
        return velocity[:count], velocity[count:].detach()

    def _text(self, count: int) -> TextEmbeds:
        """The empty caption ``count`` times; what is cached is read once."""
        if self._stored is None:
            self._stored = self.cached([""])
        tensors = {name: value.expand(count, *value.shape[1:]) for name, value in self._stored.tensors.items()}
        tensors.update(self.live([""] * count).tensors)
        return TextEmbeds(tensors=tensors)


def stacked(first: TextEmbeds, second: TextEmbeds, fields: Mapping[str, Field]) -> TextEmbeds:
    """Both batches [B, ...] as one [2B, ...], the shorter padded along the tokens as the loader pads."""
    tensors = {}
    for name, value in first.tensors.items():
        pair = [value, second.tensors[name].to(value.dtype)]
        if "L" in fields[name].shape:
            axis = fields[name].shape.index("L") + 1
            length = max(each.shape[axis] for each in pair)
            pair = [_padded(each, axis, length, fields[name].pad) for each in pair]
        tensors[name] = torch.cat(pair)
    return TextEmbeds(tensors=tensors)


def _padded(value: Tensor, axis: int, length: int, pad: float) -> Tensor:
    missing = length - value.shape[axis]
    if missing == 0:
        return value
    # Pairs run from the last axis backwards.
    return F.pad(value, (0, 0) * (value.ndim - 1 - axis) + (0, missing), value=pad)
