"""Whether a plugin's facts are true of its modules. Modules may be on the meta device: only names and shapes matter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.formats import decode_adapter, encode_adapter, key_maps, modules_of
from tuner.core.adapters.fused import member_of
from tuner.core.adapters.lora import adaptable_modules
from tuner.core.adapters.targets import select_targets
from tuner.core.config import NetworkConfig
from tuner.core.errors import UsageError
from tuner.core.testing.costs import cost_problems

if TYPE_CHECKING:
    from tuner.core.types import ModelFacts, Models

FIELD_DTYPES = ("float32", "bfloat16", "float16", "int64", "bool")


def fact_problems(facts: ModelFacts, models: Models) -> list[str]:
    """One sentence for everything that ``facts`` says and ``models`` is not; empty when all of it holds.

    models: the trainable components must be loaded, on any device.
    """
    inside = {name: _paths(models, name) for name in facts.trainable}
    return [
        *_names(facts),
        *_sizes(facts),
        *_fields(facts),
        *_blocks(facts, models),
        *_modulation(facts, models),
        *_patterns(facts, inside),
        *_fused(facts, models),
        *_presets(facts, inside),
        *_formats(facts, inside),
        *cost_problems(facts, models),
    ]


def _paths(models: Models, name: str) -> tuple[str, ...]:
    module = models.component(name)
    return () if module is None else tuple(adaptable_modules(module))


def _names(facts: ModelFacts) -> Iterator[str]:
    for what in ("trainable", "text_components", "step_components", "files"):
        for name in getattr(facts, what):
            if name not in facts.components:
                yield f"{what} names {name!r}, which is not among components"
    for name in ("denoiser", "vae"):
        if name not in facts.components:
            yield f"components lacks {name!r}"
    for name in facts.components:
        if name not in facts.files:
            yield f"files does not say what makes {name!r}; give an empty tuple when it is code alone"


def _sizes(facts: ModelFacts) -> Iterator[str]:
    if facts.resolution_multiple % facts.spatial_factor:
        yield f"resolution_multiple {facts.resolution_multiple} is no multiple of spatial_factor {facts.spatial_factor}"
    if facts.sample.multiple % facts.resolution_multiple:
        yield f"sample.multiple {facts.sample.multiple} is no multiple of resolution_multiple"
    for side in facts.sample.size:
        if side % facts.sample.multiple:
            yield f"sample.size {side} is no multiple of sample.multiple {facts.sample.multiple}"
    if facts.guidance_input != (facts.sample.guidance is not None):
        yield "sample.guidance must be given exactly when guidance_input is set"
    for name, limit in facts.max_tokens.items():
        if limit < 1:
            yield f"max_tokens of {name} is {limit}"


def _fields(facts: ModelFacts) -> Iterator[str]:
    for name, field in facts.text_fields.items():
        if field.dtype not in FIELD_DTYPES:
            yield f"text field {name}: dtype {field.dtype!r} is none of {', '.join(FIELD_DTYPES)}"
        if not field.of:
            yield f"text field {name}: of is empty, so nobody knows when it may be cached"
        for component in field.of:
            if component not in facts.components:
                yield f"text field {name}: there is no component {component!r}"
        for component, (first, last) in field.parts.items():
            width = field.shape[-1]
            if component not in field.of or not isinstance(width, int) or not 0 <= first < last <= width:
                yield f"text field {name}: the part {first} to {last} of {component!r} does not lie in {field.shape}"
        if field.trim is None:
            continue
        mask = facts.text_fields.get(field.trim)
        if mask is None or mask.dtype != "bool" or mask.shape != ("L",):
            yield f"text field {name}: trim must name a bool field of shape ('L',), not {field.trim!r}"
        elif mask.floor != field.floor:
            yield f"text field {name}: floor {field.floor} differs from its mask's {mask.floor}"


def _blocks(facts: ModelFacts, models: Models) -> Iterator[str]:
    denoiser = models.denoiser
    if denoiser is None:
        yield "the denoiser is not loaded"
        return
    if not facts.block_lists:
        yield "block_lists is empty: checkpointing would have nothing to act on"
    for blocks in facts.block_lists:
        try:
            found = denoiser.get_submodule(blocks.path)
        except AttributeError:
            yield f"block_lists: the denoiser has no module {blocks.path!r}"
            continue
        if not isinstance(found, torch.nn.ModuleList):
            yield f"block_lists: {blocks.path!r} is a {type(found).__name__}, not a ModuleList"
        elif len(found) != blocks.count:
            yield f"block_lists: {blocks.path!r} has {len(found)} blocks, not {blocks.count}"


def _modulation(facts: ModelFacts, models: Models) -> Iterator[str]:
    """Every pattern names linears, all of them inside the blocks: others do not run twice."""
    named = {} if models.denoiser is None else dict(models.denoiser.named_modules())
    for pattern in facts.modulation:
        matches = [path for path in named if re.fullmatch(pattern, path)]
        if not matches:
            yield f"modulation: {pattern!r} matches no module of the denoiser"
        for path in matches:
            if not isinstance(named[path], torch.nn.Linear):
                yield f"modulation: {path!r} is a {type(named[path]).__name__}, not a Linear"
            elif not any(path.startswith(f"{blocks.path}.") for blocks in facts.block_lists):
                yield f"modulation: {path!r} lies outside the blocks"


def _patterns(facts: ModelFacts, inside: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """No pattern may match nothing: it would be a typing error that nobody sees."""
    lora = facts.lora
    for component in facts.trainable:
        if not inside[component]:
            yield f"{component!r} can train, yet it holds no linear layer"
        elif not lora.include.get(component):
            yield f"lora.include says nothing about {component!r}, which can train"
    for component, patterns in lora.include.items():
        if component not in facts.trainable:
            yield f"lora.include names {component!r}, which cannot train"
        for pattern in patterns:
            if not any(re.fullmatch(pattern, path) for path in inside.get(component, ())):
                yield f"lora.include of {component}: {pattern!r} matches no module"
    included = _included(facts, inside)
    every = [path for paths in included.values() for path in paths]
    named = [("lora.exclude", lora.exclude)]
    named += [(f"kind {name!r}", (pattern,)) for name, pattern in lora.kinds.items()]
    for name, (include, exclude) in lora.presets.items():
        named += [(f"preset {name!r}", include), (f"exclusions of preset {name!r}", exclude)]
    for what, patterns in named:
        for pattern in patterns:
            if not any(re.fullmatch(pattern, path) for path in every):
                yield f"{what}: {pattern!r} matches no module"
    for group, prefix in lora.groups.items():
        if not any(path.startswith(prefix.rstrip(".") + ".") for path in included.get("denoiser", ())):
            yield f"lora.groups: nothing adaptable lies below {prefix!r} of group {group!r}"


def _fused(facts: ModelFacts, models: Models) -> Iterator[str]:
    """Every group stands somewhere, whole, and its members have the rows it says."""
    modules = {name: adaptable_modules(module) for name in facts.trainable if (module := models.component(name))}
    for rule in facts.lora.fused:
        found = False
        for name, inside in modules.items():
            first = f".{rule.members[0]}"
            parents = [path.removesuffix(first) for path in inside if path.endswith(first)]
            for parent in parents:
                if not re.fullmatch(rule.parent, parent):
                    continue
                found = True
                for member, rows in zip(rule.members, rule.rows, strict=True):
                    weight = getattr(inside.get(f"{parent}.{member}"), "weight", None)
                    if weight is None or weight.shape[0] != rows * weight.shape[1]:
                        yield f"lora.fused: {name}:{parent}.{member} is not a linear with {rows} times as many rows"
        if not found:
            yield f"lora.fused: {rule.parent!r} matches no module with {rule.members[0]!r} below it"


def _included(facts: ModelFacts, inside: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {
        name: [path for path in paths if any(re.fullmatch(each, path) for each in facts.lora.include.get(name, ()))]
        for name, paths in inside.items()
    }


def _presets(facts: ModelFacts, inside: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Every preset, and the choice without one, gives some component an adapter."""
    for name in (None, *facts.lora.presets):
        refusals = []
        for component, paths in inside.items():
            try:
                select_targets({component: paths}, NetworkConfig(rank=1, preset=name), facts)
            except UsageError as refusal:
                refusals.append(refusal.what)
        if len(refusals) == len(inside):
            yield f"{f'preset {name!r}' if name else 'the default choice'} adapts nothing: {refusals[0]}"


def _formats(facts: ModelFacts, inside: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Every adaptable module can be written in each format and is found again under its own name."""
    maps = key_maps(facts)
    if maps.format(maps.default) is None:
        yield f"key_maps: the default format {maps.default!r} is not among the formats"
    included = _included(facts, inside)
    for fmt in maps.formats:
        low_rank = "lora" in fmt.kinds
        paths = [
            (name, path)
            for name in included
            if name in fmt.prefixes
            for path in included[name]
            # A rotation has no exchanged halves.
            if low_rank or not any(re.fullmatch(pattern, path) for pattern in fmt.exchange.get(name, ()))
        ]
        if not paths:
            yield f"format {fmt.name!r} can hold no component that trains"
            continue
        tensors: dict[str, Tensor] = {}
        for name, path in paths:
            key, member = f"{name}:{path}", member_of(facts.lora.fused, path)
            if not low_rank:
                tensors |= {f"{key}.oft_blocks": torch.ones(1, 2, 2), f"{key}.alpha": torch.ones(())}
                continue
            rows = 2 * (1 if member is None else member.rule.rows[member.index])
            up = torch.ones(rows, 1)
            tensors |= {f"{key}.down": torch.ones(1, 2), f"{key}.up": up, f"{key}.alpha": torch.ones(())}
        try:
            written = encode_adapter(tensors, fmt)
            read, _ = decode_adapter(written, (fmt,), maps.paths(tuple(written)))
        except UsageError as problem:
            yield f"format {fmt.name!r}: {problem.what}"
            continue
        if lost := sorted(set(paths) ^ set(modules_of(read))):
            component, path = lost[0]
            yield f"format {fmt.name!r} does not bring {component}:{path} back ({len(lost)} such modules)"
