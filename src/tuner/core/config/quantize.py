"""``quantize``: frozen weights in few bits, and arithmetic in as few."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from tuner.core.config.base import Count, Positive, Section, changed_keys
from tuner.core.config.data_checks import Problem, Unused

if TYPE_CHECKING:
    from tuner.core.config.run import RunConfig
    from tuner.core.types import ModelFacts

# What other trainers call their ways, and why it is not offered under that name.
_ELSEWHERE = {
    "fp8_scaled": "that is 'fp8' here: the scale is always there",
    "int8-quanto": "use 'int8': the same rounding, and no input is kept for frozen weights",
    "int4-quanto": "use 'int4': the same error; quanto's cannot be compiled",
    "int2-quanto": "an error of a third of the output is not worth training on; use 'nf4'",
    "fp8-quanto": "use 'fp8': the same error",
    "fp8uz-quanto": "that number format belongs to other hardware; use 'fp8'",
    "int8-torchao": "use 'int8': the same rounding, and no copy of the weight is kept for the backward pass",
    "int4-torchao": "it needs CUDA to be packed and has no backward; use 'int4'",
    "fp8-torchao": "use 'fp8': the same rounding, and no copy of the weight is kept for the backward pass",
    "nf4-bnb": "use 'nf4': the same levels, on any device",
}


def _known_elsewhere(value: Any) -> Any:
    if isinstance(value, str) and value in _ELSEWHERE:
        raise ValueError(f"not offered under this name: {_ELSEWHERE[value]}")
    return value


Method = Annotated[Literal["int8", "fp8", "int4", "nf4", "fp8_unscaled"], BeforeValidator(_known_elsewhere)]
"""How frozen weights are stored."""


class ParityConfig(Section):
    """The check before training: the first batches with the weights as loaded, and again with quantized arithmetic."""

    batches: Count = 2
    """Batches that are compared, at noise levels spread over the whole range."""
    loss: Positive = 0.02
    """Largest difference of a batch's loss, relative to the loss."""
    gradient: Positive = 0.25
    """Largest difference of the adapter's gradient, relative to its norm."""
    on_failure: Literal["refuse", "weights_only"] = "refuse"
    """``refuse`` stops. ``weights_only`` says so and trains with read-back weights and plain arithmetic."""


class QuantizeConfig(Section):
    """Frozen weights in few bits. Adapters are never quantized and train on top."""

    denoiser: Method | None = None
    """Weights of the denoiser's linears: ``int8`` and ``fp8`` with a scale per row, ``int4`` and ``nf4`` with one per
    64 weights; ``fp8_unscaled`` is a plain cast, as some other trainers do it."""
    text_encoder: dict[str, Method] = Field(default_factory=dict)
    """The same for text encoders, by name."""
    exclude: tuple[str, ...] = ()
    """Regular expressions of module paths inside a component that stay as they are, beside what the model excludes."""
    activations: Literal["int8", "fp8"] | None = None
    """Quantized arithmetic: the denoiser's inputs and their gradients are quantized too, one scale per token, and
    products run in that type. Needs the same type in ``denoiser``."""
    parity: ParityConfig = ParityConfig()
    """When quantized arithmetic is close enough."""

    @field_validator("exclude")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return value

    def methods(self) -> dict[str, str]:
        """Component to method, for the components that are quantized."""
        return {**({} if self.denoiser is None else {"denoiser": self.denoiser}), **self.text_encoder}


def quantize_problems(config: RunConfig) -> Iterator[Problem]:
    """Combinations that cannot work, and keys without effect."""
    quantize = config.quantize
    kind = quantize.activations
    if quantize.exclude and not quantize.methods():
        yield ("quantize", "exclude"), "has no effect: nothing is quantized", "set quantize.denoiser"
    if kind is not None and quantize.denoiser != kind:
        yield ("quantize", "activations"), f"{kind!r} needs weights in {kind}", f"set quantize.denoiser to {kind!r}"
    if kind == "fp8" and config.precision.compute != "bf16":
        fix = "set precision.compute to 'bf16', or quantize.activations to 'int8'"
        yield ("quantize", "activations"), "fp8 products give bfloat16 results only", fix
    if kind is None:
        for key in sorted(changed_keys(quantize.parity)):
            yield Unused(("quantize", "parity", key), "has no effect without quantize.activations")


def unknown_quantized(config: RunConfig, facts: ModelFacts) -> Iterator[Problem]:
    """Components that the model does not have, and methods that it refuses."""
    for name, method in config.quantize.methods().items():
        path = ("quantize", "denoiser") if name == "denoiser" else ("quantize", "text_encoder", name)
        if name != "denoiser" and name not in facts.text_components:
            known = ", ".join(facts.text_components)
            yield path, f"this model has no text encoder {name!r}", f"one of: {known}" if known else "take it out"
        elif reason := facts.capabilities.get(f"quantize.{method}"):
            yield path, f"{method!r}: {reason}", "use 'fp8'" if method == "fp8_unscaled" else None
