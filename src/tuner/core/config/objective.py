"""``noise`` and ``loss``: what the model is asked to predict and how errors count."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuner.core.config.base import NotNegative, Positive, Section, Share, StepCount


class NoiseOffset(Section):
    """A random constant per sample and channel, added to the noise."""

    strength: NotNegative
    """Standard deviation of the constant."""
    random: bool = False
    """Multiply the strength by a uniform draw per sample."""
    adaptive: float = 0.0
    """Adds this times the channel's absolute mean latent to the strength; never below 0."""
    probability: Share = 1.0
    """Share of samples that get an offset."""


class InputPerturbation(Section):
    """Extra noise in the model's input that the target does not know of."""

    gamma: NotNegative
    """Strength of the extra noise."""
    random: bool = False
    """Multiply the strength by a uniform draw per sample."""
    steps: StepCount | None = None
    """Fade linearly to none over so many updates. Left out: constant."""


class NoiseConfig(Section):
    """Which noise levels are trained. Sigma is the level in 0..1; a timestep is 1000 times sigma."""

    timesteps: Literal["sigma", "uniform", "sigmoid", "shift", "logit_normal", "mode", "beta"] | None = None
    """Distribution of sigma. ``shift`` is ``sigmoid`` followed by the shift formula. Left out: the model's default."""
    sigmoid_scale: Positive = 1.0
    """Factor on the normal draw of ``sigmoid`` and ``shift``."""
    shift: Positive | Literal["auto"] | None = None
    """Moves sigma towards noise: s*sigma / (1 + (s-1)*sigma); ``auto`` goes by the image size. Left out: the model's."""
    logit_mean: float = 0.0
    """Mean of ``logit_normal``."""
    logit_std: Positive = 1.0
    """Standard deviation of ``logit_normal``."""
    mode_scale: float = 1.29
    """Scale of ``mode``."""
    beta: tuple[Positive, Positive] = (2.0, 2.0)
    """Alpha and beta of the ``beta`` distribution."""
    min_timestep: Annotated[float, Field(ge=0, le=1000)] = 0
    """Smallest timestep; draws are mapped linearly into the range."""
    max_timestep: Annotated[float, Field(ge=0, le=1000)] = 1000
    """Largest timestep."""
    stratified: bool = False
    """Spread the draws of a batch evenly instead of independently."""
    offset: NoiseOffset | None = None
    """Noise offset."""
    input_perturbation: InputPerturbation | None = None
    """Input perturbation."""


class LossMask(Section):
    """How masks of the sources count in the loss."""

    enabled: bool | None = None
    """Left out: on when any source has a mask."""
    probability: Share = 1.0
    """Share of samples whose mask is used."""
    floor: Share = 0.0
    """Smallest weight, for fully masked-out pixels."""
    normalise: bool = False
    """Divide by the mask's mean, so that masked-out pixels do not lower the loss."""


class LossConfig(Section):
    """How the error becomes a number."""

    type: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """Error of an element."""
    huber_c: Positive = 0.1
    """Threshold of ``huber`` and ``smooth_l1``."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """How the threshold depends on the noise level."""
    huber_scale: Positive = 1.0
    """Factor on the threshold for the schedules ``constant`` and ``exponential``."""
    weighting: Literal["none", "uniform", "sigma_sqrt", "cosmap"] = "uniform"
    """Weight by noise level; ``none`` and ``uniform`` are both 1."""
    min_snr_gamma: Positive | None = None
    """Cap on the signal-to-noise ratio in the weight of a sample."""
    mask: LossMask = LossMask()
    """Masked loss."""
