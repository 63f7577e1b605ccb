"""``optimizer`` and ``schedule``: how parameters move."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tuner.core.config.base import Count, NotNegative, Positive, Section, Share, StepCount

Beta = Annotated[float, Field(ge=0, lt=1)]


class LoraPlus(Section):
    """LoRA+: the up matrices learn faster than the down matrices by this ratio."""

    denoiser: Positive | None = None
    """Ratio in the denoiser."""
    text_encoder: Positive | None = None
    """Ratio in the text encoders."""


class OptimizerConfig(Section):
    """The optimizer and its rates."""

    name: str = "adamw"
    """A registered name in any case, or an import path such as ``package.module.Class``."""
    lr: Positive
    """Base learning rate."""
    betas: tuple[Beta, Beta] | tuple[Beta, Beta, Beta] | None = None
    """Decay of the running averages. Left out: the optimizer's own, 0.9 and 0.999 for AdamW."""
    eps: Positive | None = None
    """Left out: the optimizer's own, 1e-8 for AdamW."""
    weight_decay: NotNegative = 0.01
    """Weight decay."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, by its own names."""
    lr_by_component: dict[str, NotNegative] = Field(default_factory=dict)
    """Learning rate by component; the base rate for the others."""
    loraplus: LoraPlus | None = None
    """LoRA+ ratios."""


class ScheduleConfig(Section):
    """Factor on every learning rate, by update."""

    name: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
        "sine",
    ] = "constant_with_warmup"
    """Shape of the curve."""
    warmup: StepCount = 0
    """Updates in which the rate rises to its base value."""
    decay: StepCount = 0
    """Length of the decay at the end of ``warmup_stable_decay``."""
    cycles: Annotated[float, Field(gt=0)] = 1
    """Number of waves of the cosine forms; 1 is half a wave for ``cosine_with_min_lr`` and ``warmup_stable_decay``."""
    power: Positive = 1.0
    """Exponent of ``polynomial``."""
    timescale: Count | None = None
    """Time scale of ``inverse_sqrt``. Left out: the warm-up, or 10000 without one."""
    min_ratio: Share | None = None
    """Lowest factor of ``cosine_with_min_lr`` and ``warmup_stable_decay``. Left out: 0."""
    end_lr: NotNegative | None = None
    """Last rate of ``polynomial``, lowest of ``sine``; below the base rate. Left out: 1e-7."""
    period: Count | None = None
    """Half wave of ``sine`` in updates. Left out: the warm-up."""
