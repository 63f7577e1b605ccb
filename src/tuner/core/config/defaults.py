"""Defaults that depend on the model, and the checks that need its facts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tuner.core.config.attention import unsupported_masks
from tuner.core.config.base import Dtype, Section
from tuner.core.config.checks import as_errors
from tuner.core.config.data_checks import Problem
from tuner.core.config.document import RawConfig
from tuner.core.config.messages import nearest
from tuner.core.config.network import NetworkConfig, has_rank
from tuner.core.config.quantize import unknown_quantized
from tuner.core.config.run import RunConfig
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.types import ModelFacts

S = TypeVar("S", bound=Section)

_SHORT: dict[str, Dtype] = {"bfloat16": "bf16", "float32": "fp32"}


def resolve_defaults(config: RunConfig, facts: ModelFacts, *, formats: Iterable[str] = ()) -> RunConfig:
    """The same configuration with every default of the model filled in; resolving again changes nothing.

    ``facts_problems`` must have found nothing. formats: names of the adapter formats, the default first.
    """
    formats = tuple(formats)
    precision, sample, checkpoint = config.precision, config.sample, config.checkpoint
    frozen_text = _SHORT.get(facts.dtypes.text, "fp32")
    # What trains computes like the denoiser, whatever the model prefers for it when it is frozen.
    texts = {
        name: precision.compute if name in config.train.components else frozen_text for name in facts.text_components
    }
    full = config.train.mode == "full"
    return _with(
        config,
        model=_with(config.model, flavour=config.model.flavour or facts.flavour or None),
        text_encoder=_with(config.text_encoder, max_tokens={**facts.max_tokens, **config.text_encoder.max_tokens}),
        latents=_with(config.latents, posterior=config.latents.posterior or facts.posterior),
        noise=config.noise.resolved(facts.noise),
        loss=_with(config.loss, target=_loss_target(config, facts)),
        guidance=_with(config.guidance, embedded=_embedded(config, facts)),
        network=_spelled_out(_with(config.network, alpha=_alpha(config)), facts.lora.kinds),
        precision=_with(
            precision,
            vae=precision.vae or _SHORT.get(facts.dtypes.vae, "fp32"),
            text_encoder={**texts, **precision.text_encoder},
        ),
        checkpoint=_with(
            checkpoint,
            name=checkpoint.name or FilePath(checkpoint.dir).name or "adapter",
            format=None if full else checkpoint.format or next(iter(formats), None),
            dtype=checkpoint.dtype or (precision.compute if full else precision.adapter),
        ),
        sample=_with(
            sample,
            size=sample.size or facts.sample.size,
            steps=sample.steps or facts.sample.steps,
            cfg=facts.sample.cfg if sample.cfg is None else sample.cfg,
            shift=sample.shift or facts.sample.shift,
            embedded_guidance=facts.sample.guidance if sample.embedded_guidance is None else sample.embedded_guidance,
        ),
        validation=_with(
            config.validation, seed=config.train.seed if config.validation.seed is None else config.validation.seed
        ),
    )


def _alpha(config: RunConfig) -> float | None:
    """The rank, where alpha is left out and all modules have that rank; where rules set others, each keeps its own."""
    network = config.network
    if network.alpha is not None or config.train.mode == "full" or not has_rank(network):
        return network.alpha
    one_rank = all(rule.rank in (None, 0) for rule in network.rules)
    return float(network.rank) if one_rank and isinstance(network.rank, int) and network.rank > 0 else None


def _spelled_out(network: NetworkConfig, kinds: Mapping[str, str]) -> NetworkConfig:
    """With the patterns that the model's names for kinds of modules stand for."""

    def patterns(given: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if given is None else tuple(kinds.get(each, each) for each in given)

    return _with(
        network,
        targets=patterns(network.targets),
        include=patterns(network.include),
        exclude=patterns(network.exclude),
        rules=tuple(_with(rule, match=kinds.get(rule.match, rule.match)) for rule in network.rules),
    )


def _with(section: S, **values: Any) -> S:
    return section.model_copy(update=values)


def _loss_target(config: RunConfig, facts: ModelFacts) -> Literal["velocity", "clean"]:
    if config.loss.prediction == "sigma_scaled":
        return "clean"
    return config.loss.target or facts.loss_target


def _embedded(config: RunConfig, facts: ModelFacts) -> float | tuple[float, float] | None:
    if config.guidance.embedded is None and facts.guidance_input:
        return 1.0
    return config.guidance.embedded


def facts_problems(
    config: RunConfig, facts: ModelFacts, raw: RawConfig | None = None, *, formats: Iterable[str] = ()
) -> list[UsageError]:
    """Every problem of the configuration that needs the model's facts to be seen."""
    document = raw if raw is not None else RawConfig()
    found = [*_names(config, facts, tuple(formats)), *_noise(config, facts), *_geometry(config, facts)]
    found += [*_blocks(config, facts), *unknown_quantized(config, facts), *_full(config, facts)]
    found += unsupported_masks(config, facts)
    return as_errors(found, document)


def _full(config: RunConfig, facts: ModelFacts) -> Iterator[Problem]:
    if config.train.mode != "full":
        return
    if not facts.stored:
        yield ("train", "mode"), "this model does not say how its weight files are made", "train an adapter"
    for index, name in enumerate(config.train.components):
        if reason := facts.capabilities.get(f"full.{name}"):
            why = f"{name!r} does not train with train.mode 'full': {reason}"
            yield ("train", "components", index), why, "train an adapter on it, or take it out"


def _names(config: RunConfig, facts: ModelFacts, formats: tuple[str, ...]) -> Iterator[Problem]:
    trained = config.train.components
    for index, name in enumerate(trained):
        if name in facts.components and name not in facts.trainable:
            why = facts.capabilities.get(name, "this part of the model cannot train")
            yield ("train", "components", index), f"{name!r}: {why}", _one_of(facts.trainable)
        else:
            yield from _known(("train", "components", index), name, facts.trainable)
    for name in config.optimizer.lr_by_component:
        if name in facts.trainable and name not in trained:
            yield (
                ("optimizer", "lr_by_component", name),
                "has no effect: it does not train",
                "add it to train.components",
            )
        else:
            yield from _known(("optimizer", "lr_by_component", name), name, facts.trainable)
    named = (
        (("text_encoder", "max_tokens"), config.text_encoder.max_tokens, facts.max_tokens),
        (("precision", "text_encoder"), config.precision.text_encoder, facts.text_components),
        (("text_encoder", "device"), config.text_encoder.device, facts.text_components),
        (("network", "blocks"), config.network.blocks, facts.lora.groups),
    )
    for place, given, known in named:
        for name in given:
            yield from _known((*place, name), name, known)
    for name in config.text_encoder.mask_padding:
        yield from _known(("text_encoder", "mask_padding", name), name, facts.padding_masks)
    if config.text_encoder.zero_padding and not facts.zero_padding:
        yield ("text_encoder", "zero_padding"), "this model has no padding that could be zeros", "take it out"
    if config.latents.chunk_size is not None and not facts.banded_latents:
        yield ("latents", "chunk_size"), "this model's autoencoder cannot work in bands", "take it out"
    tile, multiple = config.latents.tiling, 4 * facts.spatial_factor
    if tile is not None and tile % multiple:
        yield ("latents", "tiling"), f"{tile} is not a multiple of {multiple}", _near(tile, multiple)
    for key in ("dropout", "unconditional"):
        for name in getattr(config.text_encoder, key):
            yield from _known(("text_encoder", key, name), name, separable(facts))
    preset = config.network.preset
    if preset is not None and preset in facts.capabilities:
        yield ("network", "preset"), f"{preset!r}: {facts.capabilities[preset]}", _one_of(facts.lora.presets)
    elif preset is not None:
        yield from _known(("network", "preset"), preset, facts.lora.presets)
    if config.network.split_fused and not facts.lora.fused:
        yield ("network", "split_fused"), "has no effect: this model has no fused projections", "take it out"
    if not facts.guidance_input:
        if config.guidance.embedded is not None:
            yield ("guidance", "embedded"), "this model has no embedded guidance", "take it out"
        if config.sample.embedded_guidance is not None:
            yield ("sample", "embedded_guidance"), "this model has no embedded guidance", "take it out"
    if config.checkpoint.format is not None and formats:
        yield from _known(("checkpoint", "format"), config.checkpoint.format, formats)
    computes = [_SHORT[name] for name in facts.dtypes.compute if name in _SHORT]
    if config.precision.compute not in computes:
        yield ("precision", "compute"), f"this model cannot compute in {config.precision.compute}", _one_of(computes)
    flavour = config.model.flavour
    if flavour is not None and facts.flavour and flavour != facts.flavour:
        fix = f"write {facts.flavour!r}, or leave it out"
        yield ("model", "flavour"), f"is {flavour!r}, but the weights are {facts.flavour!r}", fix


def separable(facts: ModelFacts) -> list[str]:
    """Text encoders whose values stand apart in every field that they are part of, so that they alone can be zeroed."""
    fields = facts.text_fields.values()
    return [
        name for name in facts.text_components
        if any(name in field.of for field in fields)
        and all(name in field.parts or field.of == (name,) for field in fields if name in field.of)
    ]  # fmt: skip


def _blocks(config: RunConfig, facts: ModelFacts) -> Iterator[Problem]:
    limit = sum(each.count for each in facts.block_lists) - 2
    if config.memory.swap_blocks > max(limit, 0):
        why = f"at most {limit} blocks of this model" if limit > 1 else "no blocks of this model"
        yield ("memory", "swap_blocks"), f"{why} can be in host memory: two stay on the device", "lower it"


def _noise(config: RunConfig, facts: ModelFacts) -> Iterator[Problem]:
    """Keys that the model's own distribution of noise levels leaves without effect."""
    if config.noise.timesteps is not None:
        return
    default = facts.noise.timesteps
    for key in config.noise.unused_keys(default):
        fix = "set noise.timesteps to 'shift'" if key == "shift" else "name a distribution in noise.timesteps"
        yield ("noise", key), f"is not used by timesteps {default!r}, the default of this model", fix


def _geometry(config: RunConfig, facts: ModelFacts) -> Iterator[Problem]:
    multiple = facts.resolution_multiple
    for number, entry in enumerate(config.data.sets):
        place = ("data", "sets", number)
        step = entry.buckets.step
        if entry.buckets.enabled and entry.resolution_mode != "fixed" and step % multiple:
            yield (*place, "buckets", "step"), f"{step} is not a multiple of {multiple}", _near(step, multiple)
        for side in [side for size in entry.resolution for side in size if side % multiple][:1]:
            yield (*place, "resolution"), f"{side} is not a multiple of {multiple}", _near(side, multiple)
    grid = facts.sample.multiple
    for side in [side for side in config.sample.size or () if side % grid][:1]:
        yield ("sample", "size"), f"{side} is not a multiple of {grid}", _near(side, grid)


def _near(value: int, multiple: int) -> str:
    low = value // multiple * multiple
    choices = [str(low)] if low else []
    return f"use {' or '.join([*choices, str(low + multiple)])}"


def _known(path: tuple[str | int, ...], name: str, known: Iterable[str]) -> Iterator[Problem]:
    names = list(known)
    if name not in names:
        guess = nearest(name, names)
        yield path, f"this model has no {name!r}", f"did you mean {guess!r}?" if guess else _one_of(names)


def _one_of(names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return f"one of: {listed}" if listed else "take it out; this model has none"


def resolved_text(config: RunConfig) -> str:
    """The text of ``config.resolved.json``: every key with the value in effect."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
