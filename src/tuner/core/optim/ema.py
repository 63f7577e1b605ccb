"""A running average of trained parameters, in float32 whatever the parameters are.

A bfloat16 average with decay 0.9999 would never move: its steps are smaller than the spacing of the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.config.ema import PULL
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from tuner.core.config import EmaConfig

CHUNK = 16 * 2**20
"""Elements that are fetched at once from parameters on another device or in another dtype."""


def warmup_decay(warmup: str, count: int) -> float:
    """Decay of a warm-up after ``count`` averaged updates, before any limit; 1 without a warm-up.

    updates: (1 + n)/(10 + n), as in TensorFlow's moving averages. power: 1 - (1 + n)**(-2/3), as in diffusers.
    """
    if warmup == "updates":
        return (1 + count) / (10 + count)
    if warmup == "power":
        return 1.0 - float((1 + count) ** (-2 / 3))
    return 1.0


def ema_decay(config: EmaConfig, update: int) -> float:
    """Share of the old average that update number ``update`` (from 1) keeps, for ``ema.every`` 1; 0 copies."""
    count = update - config.start
    if count <= 0:
        return 0.0
    return max(min(warmup_decay(config.warmup, count), config.decay), config.min_decay)


class Ema:
    """The average of the parameters that require grad. It follows from step numbers alone, so a resumed run goes on
    exactly with the tensors of `state`.
    """

    def __init__(self, config: EmaConfig, params: Mapping[str, nn.Parameter], device: torch.device) -> None:
        """device: where the training runs, for ``ema.device`` accelerator."""
        self.config = config
        self.device = torch.device("cpu") if config.device == "cpu" else device
        self.params = {name: parameter for name, parameter in params.items() if parameter.requires_grad}
        self.shadow = {name: self._fetched(parameter).clone() for name, parameter in self.params.items()}
        self._chunks = list(_chunks(self.params))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after update number ``step`` (from 1)."""
        config = self.config
        if step % config.every:
            return
        share = 1.0 - ema_decay(config, step) ** config.every
        for names in self._chunks:
            averages = [self.shadow[name] for name in names]
            values = [self._fetched(self.params[name]) for name in names]
            if config.feedback:
                self._pull(names, averages, values, PULL * share)
            if config.foreach:
                torch._foreach_lerp_(averages, values, share)
            else:
                for average, value in zip(averages, values, strict=True):
                    average.lerp_(value, share)
            if config.multiplier != 1.0:
                torch._foreach_mul_(averages, config.multiplier)

    def _pull(self, names: list[str], averages: list[Tensor], values: list[Tensor], strength: float) -> None:
        """Move the parameters that still train towards the average; ``values`` may share their memory and must not see
        it."""
        for number, name in enumerate(names):
            parameter, value = self.params[name], values[number]
            if not parameter.requires_grad:
                continue
            moved = value + strength * (averages[number] - value)
            values[number] = value.clone()
            parameter.copy_(moved)

    def _fetched(self, parameter: nn.Parameter) -> Tensor:
        """The parameter where the average lies and in its dtype, the parameter's own memory when both agree."""
        return parameter.detach().to(self.device, torch.promote_types(parameter.dtype, torch.float32))

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Inside, the parameters are the average (rounded to their dtype); afterwards exactly what they were.

        Equal dtypes change places tensor by tensor, so that nothing but one tensor is ever held twice.
        """
        aside: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in self.params.items():
                average = self.shadow[name]
                value = parameter.detach().to(self.device, copy=True)
                parameter.copy_(average)
                if average.dtype == parameter.dtype:
                    average.copy_(value)
                else:
                    aside[name] = value
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.params.items():
                    average = self.shadow[name]
                    if name in aside:
                        parameter.copy_(aside.pop(name))
                        continue
                    value = parameter.detach().to(self.device, copy=True)
                    parameter.copy_(average)
                    average.copy_(value)

    @torch.no_grad()
    def take(self) -> None:
        """Make the average a copy of the present parameters."""
        for name, parameter in self.params.items():
            self.shadow[name].copy_(parameter)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name: live tensors."""
        return dict(self.shadow)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a saved `state`. UsageError when it belongs to other parameters."""
        if set(tensors) != set(self.shadow) or any(tensors[n].shape != s.shape for n, s in self.shadow.items()):
            raise UsageError(
                "the saved average does not fit this run",
                where="checkpoint.resume",
                why=f"it has {len(tensors)} tensors, this run averages {len(self.shadow)}",
                fix="resume with the configuration of the saved run",
            )
        for name, average in self.shadow.items():
            average.copy_(tensors[name])


def _chunks(params: Mapping[str, nn.Parameter]) -> Iterator[list[str]]:
    """Names in groups of at most `CHUNK` elements on one device and of one dtype."""
    names: list[str] = []
    size = 0
    kind: tuple[torch.device, torch.dtype] | None = None
    for name, parameter in params.items():
        own = (parameter.device, parameter.dtype)
        if names and (own != kind or size + parameter.numel() > CHUNK):
            yield names
            names, size = [], 0
        names.append(name)
        size += parameter.numel()
        kind = own
    if names:
        yield names
