"""Adapter tensors in the names of other programs, both ways.

Inside, an adapter is `component:module path.down`, `.up` and `.alpha` (scalar; the update is scaled by alpha / rank).
A `KeyFormat` spells that as prefix + path + suffix. Reading works from the list of the model's module paths, never by
text replacement: names joined by underscores cannot be split again without it. A key that maps nowhere is an error,
because an adapter that loads in part, or with no effect, looks exactly like a bad training.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner.core.adapters.fused import Part, exchange_halves, join_parts, member_of, split_joint
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.types import KeyFormat, KeyMaps, ModelFacts

PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
)
"""Suffixes of the two matrices that programs use, whatever the rest of the name looks like."""
ALPHA = ".alpha"
OTHER_KINDS = {
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "oft_": "OFT",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon",
}
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


@dataclass(frozen=True, slots=True)
class _Stored:
    """One module of a file: the linears it means, in the order of its rows, and how its values differ from ours."""

    component: str
    paths: tuple[str, ...]
    rows: tuple[int, ...] = ()
    exchange: bool = False


def stored_module(fmt: KeyFormat, component: str, path: str) -> tuple[str, _Stored]:
    """How a format calls the module that holds a linear, without prefix and suffix, and what that module is."""
    for rule, replacement in fmt.fused.get(component, ()):
        member = member_of((rule,), path)
        if member is not None:
            joint = re.sub(f"^{rule.parent}$", replacement, member.parent)
            return joint.replace(".", fmt.separator), _Stored(component, member.paths, rule.rows)
    exchange = any(re.fullmatch(pattern, path) for pattern in fmt.exchange.get(component, ()))
    return _spelled(fmt, component, path), _Stored(component, (path,), exchange=exchange)


def module_name(fmt: KeyFormat, component: str, path: str) -> str:
    """How a format calls the module of a linear, without suffix. UsageError when it has no place for the component."""
    if component not in fmt.prefixes:
        raise UsageError(
            f"the format {fmt.name} cannot hold {component}",
            where="checkpoint.format",
            why=f"it stores {', '.join(fmt.prefixes)}",
            fix="choose another format",
        )
    return fmt.prefixes[component] + stored_module(fmt, component, path)[0]


def encode_adapter(
    tensors: Mapping[str, Tensor], fmt: KeyFormat, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Internal tensors to a format's keys, in `dtype` (None: unchanged).

    A format without alpha gets `up * alpha / rank`, multiplied in float32 before the cast. A stored alpha is not cast.
    Where the format holds several linears as one, their adapters are joined; linears without adapter become zero rows.
    """
    encoded: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in _joined(tensors, fmt).items():
        down, up = module.down, module.up
        kept = dtype or up.dtype
        if fmt.alpha is None:
            up = up if module.scale == 1.0 else up.float() * module.scale
        else:
            encoded[name + fmt.alpha] = module.alpha.detach().cpu().clone()
        for suffix, value in ((fmt.down, down.to(dtype or down.dtype)), (fmt.up, up.to(kept))):
            if name + suffix in encoded:
                raise UsageError(f"two modules would be stored as {name}", where="checkpoint.format")
            value = value.detach().cpu().contiguous()
            # Members of a group share their down; a file must hold every tensor by itself.
            value = value.clone() if value.untyped_storage().data_ptr() in seen else value
            seen.add(value.untyped_storage().data_ptr())
            encoded[name + suffix] = value
    return encoded


def _joined(tensors: Mapping[str, Tensor], fmt: KeyFormat) -> dict[str, Part]:
    """The modules of a file by their names, in the order of the linears."""
    members: dict[str, dict[str, Part]] = {}
    layouts: dict[str, _Stored] = {}
    for component, path in modules_of(tensors):
        name, layout = module_name(fmt, component, path), stored_module(fmt, component, path)[1]
        if layouts.setdefault(name, layout) != layout or path in members.get(name, {}):
            raise UsageError(f"two modules would be stored as {name}", where="checkpoint.format")
        part = Part(*(tensors[f"{component}:{path}.{kind}"] for kind in ("down", "up", "alpha")))
        if layout.exchange:
            part = Part(part.down, exchange_halves(part.down, part.up), part.alpha)
        members.setdefault(name, {})[path] = part
    return {
        name: join_parts([found.get(path) for path in layouts[name].paths], layouts[name].rows, name)
        if layouts[name].rows
        else next(iter(found.values()))
        for name, found in members.items()
    }


@dataclass(frozen=True, slots=True)
class _Key:
    """A file's key, taken apart. part: down, up or alpha; style: index of its suffix pair, -1 for alpha."""

    name: str
    part: str
    style: int


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
    keys = {key: _take_apart(key) for key in tensors}
    names = {part.name for part in keys.values() if part is not None}
    tables = [_names(fmt, paths) for fmt in formats]
    best = _best_format(formats, tables, keys)
    places: dict[str, _Stored] = {}
    for table in (tables[best], *tables) if tables else ():
        for name in names:
            if name in table:
                places.setdefault(name, table[name])
    unmapped = [key for key, part in keys.items() if part is None or part.name not in places]
    if unmapped or not tensors:
        raise _unmapped_error(unmapped, len(tensors), formats, paths)
    parts: dict[_Stored, dict[str, Tensor]] = {}
    stored_as: dict[_Stored, str] = {}
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
        module = _module(f"{place.component}:{'+'.join(place.paths)}", found, given(place.component, name))
        for path, each in zip(place.paths, _members(place, module, name), strict=True):
            key = f"{place.component}:{path}"
            if f"{key}.down" in internal:
                raise UsageError(f"two keys mean the same tensor, {key}.down", where=name)
            if each is not None:
                internal |= {f"{key}.down": each.down, f"{key}.up": each.up, f"{key}.alpha": each.alpha}
    return internal, formats[best].name


def _members(place: _Stored, module: Part, name: str) -> list[Part | None]:
    """The adapters of the linears that a file's module stands for."""
    if place.exchange:
        module = Part(module.down, exchange_halves(module.down, module.up), module.alpha)
    return split_joint(module, place.rows, name) if place.rows else [module]


def _module(key: str, found: Mapping[str, Tensor], alpha: float | None) -> Part:
    for part in ("down", "up"):
        if part not in found:
            raise UsageError(f"the file lacks {key}.{part}", why="each module needs two matrices")
    down, up = found["down"], found["up"]
    if down.ndim not in (2, 4) or up.ndim != down.ndim or down.shape[0] != up.shape[1]:
        raise UsageError(f"the matrices of {key} do not fit: {list(down.shape)} and {list(up.shape)}")
    value = found.get("alpha")
    if value is None:
        value = torch.tensor(float(down.shape[0] if alpha is None else alpha))
    if value.numel() != 1:
        raise UsageError(f"alpha of {key} is not a number", why=f"it has shape {list(value.shape)}")
    # Zero stands for "as the rank" in files of some trainers.
    if float(value) == 0:
        value = torch.tensor(float(down.shape[0]))
    return Part(down, up, value.reshape(()))


def _take_apart(key: str) -> _Key | None:
    if key.endswith(ALPHA):
        return _Key(key.removesuffix(ALPHA), "alpha", -1)
    for style, pair in enumerate(PAIRS):
        for part, suffix in zip(("down", "up"), pair, strict=True):
            if key.endswith(suffix):
                return _Key(key.removesuffix(suffix), part, style)
    return None


def _spelled(fmt: KeyFormat, component: str, path: str) -> str:
    for pattern, replacement in fmt.rename.get(component, ()):
        path = re.sub(pattern, replacement, path)
    return path.replace(".", fmt.separator)


def _names(fmt: KeyFormat, paths: Mapping[str, Sequence[str]]) -> dict[str, _Stored]:
    """Every name of a format to its module; names that would mean two modules are left out."""
    table: dict[str, _Stored] = {}
    twice: set[str] = set()
    for component, prefix in fmt.prefixes.items():
        for path in paths.get(component, ()):
            spelled, module = stored_module(fmt, component, path)
            for each in (prefix, *fmt.read_prefixes.get(component, ())):
                if table.setdefault(each + spelled, module) != module:
                    twice.add(each + spelled)
    return {name: place for name, place in table.items() if name not in twice}


def _best_format(
    formats: Sequence[KeyFormat], tables: Sequence[Mapping[str, _Stored]], keys: Mapping[str, _Key | None]
) -> int:
    """The format with most keys; between equals, the one whose suffixes and use of alpha agree, then the first."""
    parts = [part for part in keys.values() if part is not None]
    has_alpha = any(part.part == "alpha" for part in parts)

    def score(index: int) -> tuple[int, int, bool]:
        fmt = formats[index]
        known = sum(part.name in tables[index] for part in parts)
        exact = sum(key.endswith((fmt.down, fmt.up)) for key in keys)
        return known, exact, has_alpha == (fmt.alpha is not None)

    return max(range(len(formats)), key=lambda index: (*score(index), -index))


def _in_model_order(
    parts: Mapping[_Stored, dict[str, Tensor]], paths: Mapping[str, Sequence[str]]
) -> list[tuple[_Stored, dict[str, Tensor]]]:
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


PEFT_METADATA = "lora_adapter_metadata"


def peft_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings PEFT wrote, flat as in the file, or nothing. UsageError for a kind that is more than a LoRA."""
    text = metadata.get(PEFT_METADATA)
    if not text:
        return {}
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise UsageError("the adapter's metadata cannot be read", where=PEFT_METADATA, why=str(error)) from error
    if not isinstance(settings, dict):
        raise UsageError("the adapter's metadata cannot be read", where=PEFT_METADATA, why="it is no JSON object")
    if any(key.endswith("use_dora") and value for key, value in settings.items()):
        raise UsageError("this is a DoRA adapter", why="only LoRA adapters can be read")
    return settings


def _unmapped_error(
    unmapped: Sequence[str], total: int, formats: Sequence[KeyFormat], paths: Mapping[str, Sequence[str]]
) -> UsageError:
    if not total:
        return UsageError("the adapter file holds no tensors")
    kind = next((kind for part, kind in OTHER_KINDS.items() if any(part in key for key in unmapped)), None)
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
        why=f"it is a {kind} adapter, only LoRA can be read" if kind else f"a readable name would be {example}",
        fix=None if kind else "check that the adapter was made for this model family",
    )
