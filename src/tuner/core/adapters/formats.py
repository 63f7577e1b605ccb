"""Adapter tensors in the names of other programs, both ways.

Inside, an adapter is `component:module path.part`; `deltas` says what the parts of each kind mean. A LoRA has `down`,
`up` and `alpha` (scalar; the update is scaled by alpha / rank). A `KeyFormat` spells that as prefix + path + suffix.
Reading works from the list of the model's module paths, never by text replacement: names joined by underscores cannot
be split again without it. A key that maps nowhere is an error, because an adapter that
loads in part, or with no effect, looks exactly like a bad training.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner.core.adapters.deltas import kind_of
from tuner.core.adapters.fused import exchange_rows, join_members, split_members
from tuner.core.adapters.kinds import checked_parts
from tuner.core.adapters.rotation import limited
from tuner.core.adapters.spelling import (
    ALPHA,
    NUMBERED,
    PEFT_METADATA,
    StoredModule,
    find_modules,
    module_name,
    stored_module,
    take_apart,
)
from tuner.core.compute.dtypes import fitting
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.types import KeyFormat, KeyMaps, ModelFacts

UNKNOWN_KINDS = {
    "lora_mid": "LoCon with a core tensor",
    "hada_t": "LoHa with a core tensor",
    "lokr_t": "LoKr with a core tensor",
    ".rescale": "rescaled OFT",
    ".a1.weight": "GLoRA",
}
NEVER = 1.0
"""A limit on rotations that is hardly ever reached, for a format that cannot say that there is none."""
SHOWN = 8


def key_maps(facts: ModelFacts) -> KeyMaps:
    """The formats of a model: what `facts.key_maps` (`module:attribute`) names."""
    module, _, attribute = facts.key_maps.partition(":")
    maps: KeyMaps = getattr(importlib.import_module(module), attribute)
    return maps


def format_by_name(maps: KeyMaps, name: str | None, *, where: str = "checkpoint.format") -> KeyFormat:
    """The format called `name`, the model's default for None. UsageError with the known names otherwise."""
    found = maps.format(maps.default if name is None else name)
    if found is None:
        known = ", ".join(each.name for each in maps.formats)
        raise UsageError(f"unknown adapter format {name!r}", where=where, fix=f"use one of: {known}")
    return found


def modules_of(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """(component, path) of every module in internal tensors, in order."""
    keys = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return [(component, path) for component, _, path in (key.partition(":") for key in keys)]


def parts_of(tensors: Mapping[str, Tensor], component: str, path: str) -> dict[str, Tensor]:
    """The tensors of one module by part, from internal tensors."""
    key = f"{component}:{path}."
    return {name.removeprefix(key): value for name, value in tensors.items() if name.startswith(key)}


def encode_adapter(
    tensors: Mapping[str, Tensor], fmt: KeyFormat, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Internal tensors to a format's keys, in `dtype` (None: unchanged).

    A format without alpha gets `up * alpha / rank`, multiplied in float32 before the cast. A stored alpha is not cast,
    nor are the lengths of a DoRA, which act on the whole weight. Where the format holds several linears as one, their
    adapters are joined; linears without adapter become zero rows. A limit on rotations is applied to their blocks,
    because programs read it differently.
    """
    encoded: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, (_, parts) in joined_modules(tensors, fmt).items():
        for suffix, tensor in _suffixed(parts, fmt, name).items():
            if name + suffix in encoded:
                raise UsageError(f"two modules would be stored as {name}", where="checkpoint.format")
            kept = tensor.ndim == 0 or suffix == fmt.lengths
            value = tensor if kept else fitting(tensor, dtype or tensor.dtype, name + suffix)
            value = value.detach().cpu().contiguous()
            # Members of a group share their down; a file must hold every tensor by itself.
            value = value.clone() if kept or value.untyped_storage().data_ptr() in seen else value
            seen.add(value.untyped_storage().data_ptr())
            encoded[name + suffix] = value
    return encoded


def _suffixed(parts: Mapping[str, Tensor], fmt: KeyFormat, name: str) -> dict[str, Tensor]:
    """One module of a file by the suffixes of its keys, without the cast."""
    kind = "oft" if "oft_blocks.0" in parts else kind_of(parts)
    if kind not in fmt.kinds:
        raise UsageError(
            f"the format {fmt.name} cannot hold a {kind} adapter",
            where="checkpoint.format",
            why=f"its readers know {', '.join(fmt.kinds)}; {name} is one",
            fix="choose another format",
        )
    if kind in ("lora", "dora"):
        up, scale = parts["up"], float(parts["alpha"]) / parts["down"].shape[0]
        folded = up if fmt.alpha is not None or scale == 1.0 else up.float() * scale
        found = {} if fmt.alpha is None else {fmt.alpha: parts["alpha"]}
        found |= {fmt.down: parts["down"], fmt.up: folded}
        if kind == "dora":
            lengths = parts["dora_scale"]
            found[fmt.lengths] = lengths if fmt.lengths == ".dora_scale" else lengths.flatten()
        return found
    if kind in ("oft", "boft") and not fmt.numbered:
        rows = parts["oft_blocks"].shape[-1] * parts["oft_blocks"].shape[-3]
        blocks = limited(parts["oft_blocks"], float(parts["alpha"]), rows).to(parts["oft_blocks"].dtype)
        parts = {"oft_blocks": blocks, "alpha": torch.zeros(())}
    own = fmt.alpha or ALPHA
    return {own if part == "alpha" else f".{part}": value for part, value in parts.items()}


def joined_modules(tensors: Mapping[str, Tensor], fmt: KeyFormat) -> dict[str, tuple[StoredModule, dict[str, Tensor]]]:
    """The modules that a format makes of internal tensors, by their names without suffix, in the order of the linears.

    The parts of those that it joins are joined: one down, and the rows of all members.
    """
    members: dict[str, dict[str, dict[str, Tensor]]] = {}
    layouts: dict[str, StoredModule] = {}
    for component, path in modules_of(tensors):
        name, layout = module_name(fmt, component, path), stored_module(fmt, component, path)[1]
        if layouts.setdefault(name, layout) != layout or path in members.get(name, {}):
            raise UsageError(f"two modules would be stored as {name}", where="checkpoint.format")
        parts = parts_of(tensors, component, path)
        members.setdefault(name, {})[path] = exchange_rows(parts, name) if layout.exchange else parts
    joined: dict[str, tuple[StoredModule, dict[str, Tensor]]] = {}
    for name, found in members.items():
        layout = layouts[name]
        if fmt.numbered:
            parts = _number_blocks([found.get(path) for path in layout.paths], name)
        elif layout.rows:
            parts = join_members([found.get(path) for path in layout.paths], layout.rows, name)
        else:
            parts = next(iter(found.values()))
        joined[name] = (layout, parts)
    return joined


def _number_blocks(members: Sequence[Mapping[str, Tensor] | None], name: str) -> dict[str, Tensor]:
    """The rotations of the parts of a joint matrix side by side, with a limit that holds for all of them."""
    present = [parts for parts in members if parts is not None]
    first = present[0]
    if any("oft_blocks" not in parts or parts["oft_blocks"].ndim != 3 for parts in present):
        return dict(first)
    counts = {parts["oft_blocks"].shape[0] for parts in present}
    limits = {float(parts["alpha"]) for parts in present}
    if len(present) < len(members) or len(counts) > 1 or len(limits) > 1:
        raise UsageError(
            f"{name} cannot be stored as one module",
            where="checkpoint.format",
            why="all parts of a joint matrix need a rotation, with one number of blocks and one limit",
            fix="set network.block_count, and adapt every part",
        )
    found = {f"oft_blocks.{index}": parts["oft_blocks"] for index, parts in enumerate(present)}
    return {**found, "alpha": torch.tensor(limits.pop() or NEVER)}


def decode_adapter(
    tensors: Mapping[str, Tensor],
    formats: Sequence[KeyFormat],
    paths: Mapping[str, Sequence[str]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], str]:
    """A file's tensors to internal ones, and the name of the format that fits them best.

    paths: component to the module paths that may occur. Where a module has no alpha key, `metadata` written by PEFT
    may give it; else it is the rank. Raises UsageError naming every key that maps nowhere, and every incomplete pair.
    """
    keys = {key: take_apart(key) for key in tensors}
    best, places = find_modules(formats, paths, keys)
    unmapped = [key for key, part in keys.items() if part is None or part.name not in places]
    if unmapped or not tensors:
        raise _unmapped_error(unmapped, len(tensors), formats, paths)
    parts: dict[StoredModule, dict[str, Tensor]] = {}
    stored_as: dict[StoredModule, str] = {}
    for key, part in keys.items():
        assert part is not None
        place = places[part.name]
        if part.part in parts.setdefault(place, {}):
            meant = f"{place.component}:{'+'.join(place.paths)}.{part.part}"
            raise UsageError(f"two keys mean the same tensor, {meant}", where=key)
        parts[place][part.part] = tensors[key]
        stored_as[place] = part.name
    given = _PeftAlpha(metadata or {}, formats)
    internal: dict[str, Tensor] = {}
    for place, found in _in_model_order(parts, paths):
        name = stored_as[place]
        named = split_module(place, found, name, given(place.component, name))
        for twice in named.keys() & internal.keys():
            raise UsageError(f"two keys mean the same tensor, {twice}", where=name)
        internal |= named
    return internal, formats[best].name


def split_module(
    place: StoredModule, found: Mapping[str, Tensor], name: str, alpha: float | None = None
) -> dict[str, Tensor]:
    """Internal tensors of one module of a file, the reverse of `joined_modules`. alpha: where it has none."""
    return {
        f"{place.component}:{path}.{kind}": value
        for path, each in zip(place.paths, _members(place, found, name, alpha), strict=True)
        for kind, value in (each or {}).items()
    }


def _members(
    place: StoredModule, found: Mapping[str, Tensor], name: str, alpha: float | None
) -> Sequence[dict[str, Tensor] | None]:
    """The adapters of the linears that a file's module stands for."""
    key = f"{place.component}:{'+'.join(place.paths)}"
    if any(NUMBERED.fullmatch(f".{part}") for part in found):
        limit = {"alpha": found["alpha"]} if "alpha" in found else {}
        wanted = [f"oft_blocks.{index}" for index in range(len(place.paths))]
        if set(found) - {"alpha"} != set(wanted):
            raise UsageError(f"the file has {', '.join(sorted(found))} for {key}", why=f"it needs {', '.join(wanted)}")
        return [checked_parts({"oft_blocks": found[part], **limit}, key) for part in wanted]
    parts = checked_parts(found, key, rank_alpha=alpha)
    if place.exchange:
        parts = exchange_rows(parts, key)
    return split_members(parts, place.rows, name) if place.rows else [parts]


def _in_model_order(
    parts: Mapping[StoredModule, dict[str, Tensor]], paths: Mapping[str, Sequence[str]]
) -> list[tuple[StoredModule, dict[str, Tensor]]]:
    modules = ((component, path) for component, inside in paths.items() for path in inside)
    order = {module: number for number, module in enumerate(modules)}
    return sorted(parts.items(), key=lambda item: order[item[0].component, item[0].paths[0]])


class _PeftAlpha:
    """Alphas that PEFT keeps in the metadata of a file instead of in tensors (`lora_alpha`, patterns, rsLoRA)."""

    def __init__(self, metadata: Mapping[str, str], formats: Sequence[KeyFormat]) -> None:
        self.settings = peft_settings(metadata)
        self.formats = formats

    def __call__(self, component: str, name: str) -> float | None:
        for fmt in self.formats:
            for prefix in (fmt.prefixes.get(component), *fmt.read_prefixes.get(component, ())):
                root = (prefix or "").rstrip(".")
                if root and name.startswith(f"{root}.") and f"{root}.lora_alpha" in self.settings:
                    return self._alpha(root, name.removeprefix(f"{root}."))
        return None

    def _alpha(self, root: str, name: str) -> float:
        rank = self._by_pattern(root, "rank_pattern", name, self.settings.get(f"{root}.r", 0))
        alpha = self._by_pattern(root, "alpha_pattern", name, self.settings[f"{root}.lora_alpha"])
        return alpha * math.sqrt(rank) if self.settings.get(f"{root}.use_rslora") else alpha

    def _by_pattern(self, root: str, key: str, name: str, default: Any) -> float:
        patterns = self.settings.get(f"{root}.{key}") or {}
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return float(value)
        return float(default)


def peft_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings PEFT wrote, flat as in the file, or nothing."""
    text = metadata.get(PEFT_METADATA)
    if not text:
        return {}
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise UsageError("the adapter's metadata cannot be read", where=PEFT_METADATA, why=str(error)) from error
    if not isinstance(settings, dict):
        raise UsageError("the adapter's metadata cannot be read", where=PEFT_METADATA, why="it is no JSON object")
    return settings


def _unmapped_error(
    unmapped: Sequence[str], total: int, formats: Sequence[KeyFormat], paths: Mapping[str, Sequence[str]]
) -> UsageError:
    if not total:
        return UsageError("the adapter file holds no tensors")
    kind = next((kind for part, kind in UNKNOWN_KINDS.items() if any(part in key for key in unmapped)), None)
    listed = "\n".join(f"    {key}" for key in unmapped[:SHOWN])
    more = f"\n    and {len(unmapped) - SHOWN} more" if len(unmapped) > SHOWN else ""
    example = "none"
    for fmt in formats:
        component = next((name for name in fmt.prefixes if paths.get(name)), None)
        if component is not None:
            example = module_name(fmt, component, paths[component][0]) + fmt.down
            break
    return UsageError(
        f"{len(unmapped)} of {total} keys of the adapter belong to no module of this model:\n{listed}{more}",
        why=f"it is a {kind}, which is not supported" if kind else f"a readable name would be {example}",
        fix=None if kind else "check that the adapter was made for this model family",
    )
