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


def module_name(fmt: KeyFormat, component: str, path: str) -> str:
    """How a format calls a module, without suffix. UsageError when it has no place for the component."""
    if component not in fmt.prefixes:
        raise UsageError(
            f"the format {fmt.name} cannot hold {component}",
            where="checkpoint.format",
            why=f"it stores {', '.join(fmt.prefixes)}",
            fix="choose another format",
        )
    return fmt.prefixes[component] + _spelled(fmt, component, path)


def encode_adapter(
    tensors: Mapping[str, Tensor], fmt: KeyFormat, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Internal tensors to a format's keys, in `dtype` (None: unchanged).

    A format without alpha gets `up * alpha / rank`, multiplied in float32 before the cast. A stored alpha is not cast.
    """
    encoded: dict[str, Tensor] = {}
    for component, path in modules_of(tensors):
        name, key = module_name(fmt, component, path), f"{component}:{path}"
        down, up, alpha = (tensors[f"{key}.{part}"] for part in ("down", "up", "alpha"))
        kept = dtype or up.dtype
        if fmt.alpha is None:
            scale = float(alpha) / down.shape[0]
            up = up if scale == 1.0 else up.float() * scale
        else:
            encoded[name + fmt.alpha] = alpha.detach().cpu().clone()
        for suffix, value in ((fmt.down, down.to(dtype or down.dtype)), (fmt.up, up.to(kept))):
            if name + suffix in encoded:
                raise UsageError(f"two modules would be stored as {name}", where="checkpoint.format")
            encoded[name + suffix] = value.detach().cpu().contiguous()
    return encoded


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
    places: dict[str, tuple[str, str]] = {}
    for table in (tables[best], *tables) if tables else ():
        for name in names:
            if name in table:
                places.setdefault(name, table[name])
    unmapped = [key for key, part in keys.items() if part is None or part.name not in places]
    if unmapped or not tensors:
        raise _unmapped_error(unmapped, len(tensors), formats, paths)
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    stored_as: dict[tuple[str, str], str] = {}
    for key, part in keys.items():
        assert part is not None
        place = places[part.name]
        if part.part in parts.setdefault(place, {}):
            raise UsageError(f"two keys mean the same tensor, {place[0]}:{place[1]}.{part.part}", where=key)
        parts[place][part.part] = tensors[key]
        stored_as[place] = part.name
    given = _PeftAlpha(metadata or {}, formats)
    internal: dict[str, Tensor] = {}
    for (component, path), found in _in_model_order(parts, paths):
        internal.update(_module_tensors(f"{component}:{path}", found, given(component, stored_as[component, path])))
    return internal, formats[best].name


def _module_tensors(key: str, found: Mapping[str, Tensor], alpha: float | None) -> dict[str, Tensor]:
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
    return {f"{key}.down": down, f"{key}.up": up, f"{key}.alpha": value.reshape(())}


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


def _names(fmt: KeyFormat, paths: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str]]:
    """Every name of a format to its module; names that would mean two modules are left out."""
    table: dict[str, tuple[str, str]] = {}
    twice: set[str] = set()
    for component, prefix in fmt.prefixes.items():
        for path in paths.get(component, ()):
            spelled = _spelled(fmt, component, path)
            for each in (prefix, *fmt.read_prefixes.get(component, ())):
                if table.setdefault(each + spelled, (component, path)) != (component, path):
                    twice.add(each + spelled)
    return {name: place for name, place in table.items() if name not in twice}


def _best_format(
    formats: Sequence[KeyFormat], tables: Sequence[Mapping[str, tuple[str, str]]], keys: Mapping[str, _Key | None]
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
    parts: Mapping[tuple[str, str], dict[str, Tensor]], paths: Mapping[str, Sequence[str]]
) -> list[tuple[tuple[str, str], dict[str, Tensor]]]:
    order = ((component, path) for component, inside in paths.items() for path in inside)
    return [(place, parts[place]) for place in order if place in parts]


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
