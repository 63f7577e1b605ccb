"""Quantization in a run: what the device can do, loading, and the check of quantized arithmetic before training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tuner.core.adapters.network import adapter_eval
from tuner.core.compute.quantized import Arithmetic, multiplying, quantized_linears, set_arithmetic
from tuner.core.errors import UsageError
from tuner.core.memory.quantize import Quantized, quantize_component
from tuner.core.registry.facade import default_placement
from tuner.core.train.measure import losses_and_gradient
from tuner.core.train.merging import merge_adapters
from tuner.core.types import Batch, Models, Network, TextEmbeds

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.config.quantize import ParityConfig
    from tuner.core.registry import Run
    from tuner.core.registry.facade import ModelFacade

log = logging.getLogger(__name__)

CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}
"""CUDA compute capability that products in these types need: Ampere, and Ada or Hopper."""


def check_quantize(config: RunConfig, device: torch.device) -> None:
    """Raise a UsageError for what this device cannot do; nothing is replaced by something else."""
    quantize = config.quantize
    if device.type == "mps":
        for name, method in quantize.methods().items():
            if method.startswith("fp8"):
                raise _cannot(f"{method} weights", f"quantize ({name})", "this device has no such numbers", "'int8'")
    kind = quantize.activations
    if kind is None or (kind == "int8" and device.type == "cpu"):
        return
    if device.type != "cuda":
        fix = "null" if kind == "int8" or device.type != "cpu" else "'int8', with quantize.denoiser 'int8', or null"
        raise _cannot(f"{kind} arithmetic", "quantize.activations", f"it does not run on {device.type} devices", fix)
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY[kind]:
        needed, has = (".".join(map(str, version)) for version in (CAPABILITY[kind], found))
        why = f"it needs CUDA compute capability {needed}, this GPU has {has}"
        raise _cannot(f"{kind} arithmetic", "quantize.activations", why, "null")


def _cannot(what: str, where: str, why: str, use: str) -> UsageError:
    return UsageError(f"{what} cannot be used here", where=where, why=why, fix=f"use {use} instead")


# --- loading ----------------------------------------------------------------------------------------------------------


def load_components(
    run: Run, components: Collection[str], device: torch.device, prepare: Callable[[Models], None] | None = None
) -> Models:
    """Load components on ``device``, with merged adapters, then quantized where the configuration says so: this comes
    before everything else.

    What is quantized is loaded into host memory and goes to the device weight by weight, so that the device never holds
    it in full. A denoiser with streamed blocks stays in host memory: streaming moves the rest of it; so does an encoder
    that ``text_encoder.device`` keeps there. prepare: comes between merging and quantization.
    """
    config, facts = run.config, run.facts
    homes = dict.fromkeys(components, device)
    if config.memory.swap_blocks and "denoiser" in homes:
        homes["denoiser"] = torch.device("cpu")
    homes |= {name: torch.device("cpu") for name in components if config.text_encoder.device.get(name) == "cpu"}
    methods = {name: method for name, method in config.quantize.methods().items() if name in components}
    models = Models()
    for home in dict.fromkeys(homes.values()):
        plain = tuple(name for name in components if name not in methods and homes[name] == home)
        if plain:
            loaded = run.model.load_models(plain, default_placement(config, facts, str(home)))
            merge_adapters(run, loaded, plain)
            models = _joined(models, loaded)
    loaded = Models()
    if methods:
        loaded = run.model.load_models(tuple(methods), default_placement(config, facts, "cpu"))
        merge_adapters(run, loaded, tuple(methods))
    everything = _joined(models, loaded)
    if prepare is not None:
        prepare(everything)
    for name, method in methods.items():
        module = loaded.component(name)
        assert module is not None
        told = quantize_component(
            module,
            method,
            component=name,
            no_quantize=facts.no_quantize,
            exclude=config.quantize.exclude,
            device=homes[name],
            keep_original=name == "denoiser" and config.quantize.activations is not None,
        )
        module.to(homes[name])
        _tell(told)
    return everything


def _joined(one: Models, other: Models) -> Models:
    return Models(
        denoiser=other.denoiser or one.denoiser,
        vae=other.vae or one.vae,
        text_encoders={**one.text_encoders, **other.text_encoders},
        tokenizers={**one.tokenizers, **other.tokenizers},
        others={**one.others, **other.others},
    )


def _tell(told: Quantized) -> None:
    log.info(
        "%s: %d linears in %s, %.2f GB instead of %.2f; %d linears kept as they are",
        told.component, told.count, told.method, told.after / 1e9, told.before / 1e9, len(told.kept),
    )  # fmt: skip


# --- quantized arithmetic ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far quantized arithmetic is from plain arithmetic with the weights as loaded.

    loss: largest relative difference of a batch's loss. gradient: norm of the difference of the adapter's gradient,
    relative to its norm. linears: how many compute in that type; others: quantized linears whose sizes do not allow it.
    faster: time of a pass from read-back weights over that of one in that type, None where the check failed.
    """

    arithmetic: str
    loss: float
    gradient: float
    linears: int
    others: int
    passed: bool
    faster: float | None = None


def check_parity(
    facade: ModelFacade,
    models: Models,
    network: Network,
    batches: Sequence[Batch],
    *,
    text: Callable[[Batch], TextEmbeds],
    device: torch.device,
    seed: int,
    arithmetic: Arithmetic,
    limits: ParityConfig,
) -> Parity:
    """Compare, switch the denoiser to what the outcome allows, and let go of the original weights.

    Draws from its own streams and leaves no gradient behind. UsageError when the check fails and
    ``limits.on_failure`` is ``refuse``, or when no linear can compute in that type.
    """
    denoiser = models.denoiser
    assert denoiser is not None
    quantized = list(quantized_linears(denoiser))
    able = sum(linear.can_multiply(arithmetic) for linear in quantized)
    if able == 0:
        raise _cannot(f"{arithmetic} arithmetic", "quantize.activations", "the sizes of no linear allow it", "null")
    parameters = [each for group in network.param_groups for each in group.params.values() if each.requires_grad]

    def measure(kind: Arithmetic, count: int | None = None) -> tuple[list[float], Tensor]:
        chosen = batches[:count]
        with adapter_eval(network), multiplying(denoiser, kind):
            return losses_and_gradient(facade, models, chosen, parameters, text=text, device=device, seed=seed)

    def seconds(kind: Arithmetic) -> float:
        started = time.perf_counter()
        float(measure(kind, 1)[1].norm())
        return time.perf_counter() - started

    losses, gradient = measure("original")
    losses_now, gradient_now = measure(arithmetic)
    loss = max(abs(now - before) / before for now, before in zip(losses_now, losses, strict=True))
    apart = float((gradient_now - gradient).norm() / gradient.norm())
    # Written so that a result that is not a number fails.
    passed = loss <= limits.loss and apart <= limits.gradient
    faster = None
    if passed:
        # The first pass from read-back weights is not counted: it may compile, and asks for memory.
        seconds("weights")
        faster = seconds("weights") / seconds(arithmetic)
    result = Parity(
        arithmetic=arithmetic, loss=loss, gradient=apart, linears=able, others=len(quantized) - able, passed=passed,
        faster=faster,
    )  # fmt: skip
    _forget_originals(denoiser)
    if not passed and limits.on_failure == "refuse":
        raise UsageError(
            f"{arithmetic} arithmetic is too far from plain arithmetic",
            where="quantize.activations",
            why=difference_text(result),
            fix="take quantize.activations out, exclude modules, raise quantize.parity, or set its on_failure to "
            "'weights_only'",
        )
    set_arithmetic(denoiser, arithmetic if passed else "weights")
    return result


def use_arithmetic(denoiser: nn.Module, arithmetic: Arithmetic) -> None:
    """Compute so without a comparison, which needs training data, and let go of the original weights."""
    _forget_originals(denoiser)
    set_arithmetic(denoiser, arithmetic)


def _forget_originals(denoiser: nn.Module) -> None:
    for linear in quantized_linears(denoiser):
        linear.original = None


def difference_text(result: Parity) -> str:
    """How far quantized arithmetic is from plain arithmetic, in words."""
    return f"the loss differs by {result.loss:.2%}, the adapter's gradient by {result.gradient:.2%}"
