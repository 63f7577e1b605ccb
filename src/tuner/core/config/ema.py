"""``ema``: a running average of what trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tuner.core.config.base import Count, CountOrZero, Positive, Section

Decay = Annotated[float, Field(ge=0, lt=1)]

PULL = 10
"""How much stronger ``ema.feedback`` pulls the weights than the average moves (ostris/ai-toolkit)."""


class EmaConfig(Section):
    """A running average of what trains, kept in float32: ``average += (1 - decay) * (weights - average)``.

    It is saved beside the weights as ``ema_<name>`` and does not touch the training, unless ``feedback``.
    """

    enabled: bool = False
    """Keep an average."""
    decay: Decay = 0.999
    """Share of the old average that an update keeps; 0.999 looks back over about 1000 updates."""
    warmup: Literal["none", "updates", "power"] = "none"
    """Smaller decay in the beginning, never above ``decay``: after n updates ``updates`` is (1 + n) / (10 + n), and
    ``power`` is 1 - (1 + n) ** (-2/3)."""
    min_decay: Decay = 0.0
    """Smallest decay of a warm-up."""
    start: CountOrZero = 0
    """Until so many updates are done the average is a copy of the weights; a warm-up counts from there."""
    every: Count = 1
    """Average at every so many updates, with the decay to that power, so that the average looks back equally far."""
    device: Literal["cpu", "accelerator"] = "cpu"
    """Where the average lies: host memory, or beside the weights, which is faster."""
    foreach: bool = True
    """Many tensors in one operation. Off: one by one."""
    feedback: bool = False
    """Experimental: after each update pull the weights towards the average as it was before, by
    10 * (1 - decay) * (average - weights)."""
    multiplier: Positive = 1.0
    """Experimental: factor on the average after each of its updates."""
    init_from: str | None = None
    """Adapter file to start the average from. Left out: the weights before the first update."""

    @model_validator(mode="after")
    def _check(self) -> EmaConfig:
        if self.min_decay > self.decay:
            raise ValueError("min_decay must not be above decay")
        if self.min_decay > 0 and self.warmup == "none":
            raise ValueError("min_decay is not used without a warmup")
        if self.init_from is not None and self.start > 0:
            raise ValueError("start copies the weights, so nothing of init_from would be left")
        if self.feedback and (self.warmup != "none" or self.start > 0):
            raise ValueError(
                "feedback needs a constant decay: with a small one it overshoots; use no warmup and start 0"
            )
        if self.feedback and PULL * (1 - self.decay**self.every) > 1:
            raise ValueError(f"feedback would overshoot: {PULL} * (1 - decay ** every) is above 1; raise decay")
        return self
