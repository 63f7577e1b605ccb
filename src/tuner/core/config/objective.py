"""``noise`` and ``loss``: what the model is asked to predict and how errors count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from tuner.core.config.base import NotNegative, Positive, Section, Share, StepCount, changed_keys

if TYPE_CHECKING:
    from tuner.core.types import NoiseDefaults


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


AtLeastHalf = Annotated[float, Field(ge=0.5)]


class NoiseConfig(Section):
    """Which noise levels are trained. Sigma is the level in 0..1; a timestep is 1000 times sigma."""

    timesteps: Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift", "logit_normal", "mode", "beta"] | None = (
        None
    )
    """Distribution of sigma. ``shift`` is ``sigmoid`` followed by the shift formula, ``flux_shift`` the same with a
    shift that grows with the image, ``sigma`` an entry of a table of 1000 levels. Left out: the model's default."""
    density: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """Where ``timesteps = sigma`` draws from its table; small draws mean much noise."""
    sigmoid_scale: Positive = 1.0
    """Factor on the normal draw of ``sigmoid``, ``shift`` and ``flux_shift``."""
    shift: Positive | Literal["auto"] | None = None
    """Moves sigma towards noise: s*sigma / (1 + (s-1)*sigma); ``auto`` goes by the image size. Not for ``sigmoid`` and
    ``flux_shift``. Left out: the model's for ``shift`` and ``sigma``, else 1."""
    logit_mean: float = 0.0
    """Mean of the normal draw of ``logit_normal``."""
    logit_std: Positive = 1.0
    """Standard deviation of the normal draw of ``logit_normal``."""
    mode_scale: float = 1.29
    """Scale of ``mode``."""
    beta: tuple[AtLeastHalf, AtLeastHalf] = (2.0, 2.0)
    """Alpha and beta of the ``beta`` distribution, each at least 0.5."""
    min_timestep: Annotated[float, Field(ge=0, le=1000)] = 0
    """Smallest timestep; draws are mapped linearly into the range."""
    max_timestep: Annotated[float, Field(ge=0, le=1000)] = 1000
    """Largest timestep."""
    truncate: bool | None = None
    """Cut timesteps to whole numbers. Left out: as the model was trained."""
    stratified: bool = False
    """Spread the draws of a batch evenly instead of independently."""
    offset: NoiseOffset | None = None
    """Noise offset."""
    input_perturbation: InputPerturbation | None = None
    """Input perturbation."""

    @model_validator(mode="after")
    def _check(self) -> NoiseConfig:
        if self.min_timestep >= self.max_timestep:
            raise ValueError("min_timestep must be below max_timestep")
        if self.timesteps is not None and (unused := self.unused_keys(self.timesteps)):
            hint = "; use timesteps 'shift'" if unused[0] == "shift" and self.timesteps == "sigmoid" else ""
            raise ValueError(f"{unused[0]} is not used by timesteps {self.timesteps!r}{hint}")
        return self

    def unused_keys(self, timesteps: str) -> list[str]:
        """Keys that are set and that the distribution ``timesteps`` does not use."""
        drawn = self.density if timesteps == "sigma" else timesteps
        used = _USED_KEYS.get(timesteps, {"shift"}) | _DENSITY_KEYS.get(drawn, set())
        return sorted((changed_keys(self) & _SHAPE_KEYS) - used)

    def resolved(self, defaults: NoiseDefaults) -> NoiseConfig:
        """With the model's defaults filled in: ``timesteps`` and, where the distribution uses one, ``shift``."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        timesteps = self.timesteps or defaults.timesteps
        given["timesteps"] = timesteps
        if self.shift is None:
            given.pop("shift", None)
            if timesteps in ("shift", "sigma"):
                given["shift"] = defaults.shift
        if self.truncate is None:
            given["truncate"] = defaults.truncate
        return NoiseConfig.model_validate(given)


_SHAPE_KEYS = {"density", "sigmoid_scale", "shift", "logit_mean", "logit_std", "mode_scale", "beta"}
_USED_KEYS = {
    "sigma": {"density", "shift"},
    "sigmoid": {"sigmoid_scale"},
    "flux_shift": {"sigmoid_scale"},
    "shift": {"sigmoid_scale", "shift"},
    "beta": {"beta", "shift"},
}
_DENSITY_KEYS = {"logit_normal": {"logit_mean", "logit_std"}, "mode": {"mode_scale"}}


class GuidanceDistill(Section):
    """Teach the model to give at once what classifier-free guidance would give."""

    scale: Positive
    """Strength of the guidance, usually 1 to 5. The target is u + scale * (target - u), with u the model's own
    prediction for the empty caption; 1 changes nothing and costs nothing."""
    zero_star: bool = False
    """CFG-Zero*: first scale u, per sample, to its share in the target."""
    batched: bool = False
    """Predict both captions in one doubled batch. Off: u comes from a pass of its own that keeps nothing for the
    backward pass, which takes less memory and, unless batches are tiny, less time."""

    @model_validator(mode="after")
    def _check(self) -> GuidanceDistill:
        for name in sorted(changed_keys(self) - {"scale"}):
            if self.scale == 1:
                raise ValueError(f"{name} has no effect with scale 1")
        return self


class GuidanceConfig(Section):
    """Guidance as an input of the model, and as part of the training target. Validation measures the plain target."""

    embedded: NotNegative | tuple[NotNegative, NotNegative] | None = None
    """Value of the embedded guidance: one number, or ``[min, max]`` to draw from per sample. Only for models with that
    input. Left out: 1."""
    distill: GuidanceDistill | None = None
    """Guidance distillation: an extra prediction for the empty caption in every step."""
    differential: Positive | None = None
    """Differential guidance, usually 1 to 5: the target is p + factor * (target - p), with p the prediction held
    constant, after ``distill``. Gradients grow by the factor, which optimizers like AdamW largely cancel. 1 changes
    nothing."""

    @model_validator(mode="after")
    def _check(self) -> GuidanceConfig:
        if isinstance(self.embedded, tuple) and self.embedded[0] > self.embedded[1]:
            raise ValueError("embedded must be [min, max] with min not above max")
        return self


class LossMask(Section):
    """How masks of the sources count in the loss."""

    enabled: bool | None = None
    """Left out: on when any source has a mask."""
    probability: Share = 1.0
    """Share of samples whose mask is used."""
    floor: Share = 0.0
    """Smallest weight: lower mask values are raised to it."""
    normalise: bool = False
    """Average over the masked-in area only, so that masked-out pixels do not lower the loss."""


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
    target: Literal["velocity", "clean"] | None = None
    """What is compared: velocities, or the clean latents they imply, which multiplies the error by sigma. Left out: the
    model's own choice."""
    prediction: Literal["raw", "additive", "sigma_scaled"] = "raw"
    """What the model's output stands for: the velocity itself; the velocity less the noisy input (``additive``); or the
    velocity, compared as the clean latents it implies (``sigma_scaled``, the same as ``target`` clean)."""
    mask: LossMask = LossMask()
    """Masked loss."""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        given = changed_keys(self)
        if self.prediction == "sigma_scaled" and self.target == "velocity":
            raise ValueError("prediction 'sigma_scaled' compares clean latents; take target out")
        if self.type in ("l1", "l2"):
            for name in ("huber_c", "huber_schedule", "huber_scale"):
                if name in given:
                    raise ValueError(f"{name} is not used by type {self.type!r}; it belongs to huber and smooth_l1")
        elif self.huber_schedule == "snr" and "huber_scale" in given:
            raise ValueError("huber_scale is not used by huber_schedule 'snr'")
        return self
