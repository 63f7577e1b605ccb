"""``optimizer`` and ``schedule``: how parameters move."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tuner.core.config.base import Count, NotNegative, Positive, Section, Share, StepCount, changed_keys

Beta = Annotated[float, Field(ge=0, lt=1)]


class LoraPlus(Section):
    """LoRA+: the up matrices learn faster than the down matrices by this ratio."""

    denoiser: Positive | None = None
    """Ratio in the denoiser."""
    text_encoder: Positive | None = None
    """Ratio in the text encoders."""


class LrRule(Section):
    """A learning rate for part of the trainable parameters."""

    match: str | None = None
    """Regular expression that must match a whole parameter name, ``component:path``."""
    group: str | None = None
    """Instead of ``match``, in full training: a group of parameters that the model names, a component other than the
    denoiser, or ``base`` for those of the denoiser that are in none."""
    lr: NotNegative
    """Learning rate; 0 keeps these parameters as they are."""

    @model_validator(mode="after")
    def _one(self) -> LrRule:
        if (self.match is None) == (self.group is None):
            raise ValueError("give match or group")
        return self


class OptimizerConfig(Section):
    """The optimizer and its rates."""

    name: str = "adamw"
    """A registered name in any case, or an import path such as ``package.module.Class``."""
    lr: Positive
    """Base learning rate."""
    betas: tuple[Beta, Beta] | tuple[Beta, Beta, Beta] | None = None
    """Decay of the running averages. Left out: the optimizer's own, 0.9 and 0.999 for AdamW."""
    eps: Positive | None = None
    """Term that keeps divisions finite. Left out: the optimizer's own, 1e-8 for AdamW."""
    weight_decay: NotNegative | None = None
    """Weight decay. Left out: the optimizer's own, 0.01 for AdamW."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, by its own names."""
    lr_by_component: dict[str, NotNegative] = Field(default_factory=dict)
    """Learning rate by component; the base rate for the others. 0 keeps a component as it is."""
    lr_rules: tuple[LrRule, ...] = ()
    """Learning rates by parameter name; the first match wins, also over the network's own rules."""
    loraplus: LoraPlus | None = None
    """LoRA+ ratios."""
    lr_scale: Literal["none", "linear", "sqrt"] = "none"
    """Multiply every rate by the samples of an update (``train.batch_size`` times ``train.accumulate``), or by the
    square root of that."""
    rounding: Literal["nearest", "stochastic", "kahan"] = "nearest"
    """How weights that train in bfloat16 are rounded after an update, which is computed in float32. ``nearest`` leaves
    it to the optimizer and loses changes below 1/256 of a weight. ``stochastic`` rounds up or down with chances that
    are right on average. ``kahan`` keeps what was lost in two more bytes per value."""
    fuse: Literal["off", "parameter", "block"] = "off"
    """Update during the backward pass and free each gradient at once: of every parameter by itself, or of a block of
    the denoiser together. Gradients then take next to no memory. Not with accumulation, nor with a limit on their
    norm."""
    offload: bool = False
    """Keep the optimizer's state in host memory between updates."""


class SchedulePiece(Section):
    """One flat part of ``piecewise_constant``."""

    until: StepCount | None = None
    """First update that no longer belongs to it. Left out: the last piece."""
    factor: NotNegative
    """Factor on the learning rates."""


class ScheduleConfig(Section):
    """Factor on every learning rate, by update."""

    class_: str | None = Field(None, alias="class")
    """A scheduler of torch, or with the same interface, by import path; instead of ``name``. It sees updates, not
    epochs."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``class``."""
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
        "piecewise_constant",
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
    """Lowest factor of ``cosine_with_min_lr`` and ``warmup_stable_decay``. Left out: 0. The warm-up of
    ``warmup_stable_decay`` starts there too."""
    end_lr: NotNegative | None = None
    """Lowest rate, below every base rate; another spelling of the floor than ``min_ratio``. Left out: 1e-7 for
    ``polynomial``, else 0."""
    period: Count | None = None
    """Half wave of ``sine`` in updates, which has no warm-up and starts half way up."""
    pieces: tuple[SchedulePiece, ...] = ()
    """The parts of ``piecewise_constant``, in order."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        used = {"class_", "args"} if self.class_ else _USED[self.name]
        for name in sorted(changed_keys(self) - {"name"}):
            if name not in used and self.class_:
                raise ValueError(f"{name} is not used with a class")
            if name not in used:
                raise ValueError(f"{name} is not used by the schedule {self.name!r}")
        for name in _NEEDED.get(self.name, ()):
            if not getattr(self, name):
                raise ValueError(f"the schedule {self.name!r} needs {name}")
        if self.min_ratio is not None and self.end_lr is not None:
            raise ValueError("give min_ratio or end_lr, not both")
        if self.pieces and (self.pieces[-1].until is not None or any(each.until is None for each in self.pieces[:-1])):
            raise ValueError("every piece but the last needs until, and the last has none")
        return self


_USED = {
    "constant": set[str](),
    "constant_with_warmup": {"warmup"},
    "linear": {"warmup"},
    "cosine": {"warmup"},
    "cosine_with_restarts": {"warmup", "cycles"},
    "cosine_with_min_lr": {"warmup", "cycles", "min_ratio", "end_lr"},
    "polynomial": {"warmup", "power", "end_lr"},
    "inverse_sqrt": {"warmup", "timescale"},
    "warmup_stable_decay": {"warmup", "decay", "cycles", "min_ratio", "end_lr"},
    "piecewise_constant": {"pieces"},
    "sine": {"period", "end_lr"},
}
_NEEDED = {"warmup_stable_decay": ("decay",), "piecewise_constant": ("pieces",), "sine": ("period",)}
