"""``data.defaults`` -> set -> source, before the schema is applied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.core.config.data import DefaultsConfig, InheritedConfig
from tuner.core.config.document import RawConfig, merged, walk
from tuner.core.config.jsonc import Path

_TO_SOURCE = frozenset(InheritedConfig.model_fields)
_MISSING = object()
_TO_SET = frozenset(DefaultsConfig.model_fields) - _TO_SOURCE


def resolve_data(raw: RawConfig) -> RawConfig:
    """A copy in which every set and source carries its complete settings and nothing is left to inherit.

    Objects are merged by key, lists and plain values replaced; an explicit null goes back to the built-in default.
    Sets without a batch size take ``train.batch_size``. Places are kept for messages. Parts of the wrong shape are left
    as they are for the schema to refuse.
    """
    data = raw.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("sets"), list):
        return raw
    defaults = data.get("defaults")
    defaults = defaults if isinstance(defaults, Mapping) else {}
    train = raw.get("train")
    batch_size = train.get("batch_size", 1) if isinstance(train, Mapping) else 1
    homes: dict[Path, Path] = {}
    sets = []
    for number, entry in enumerate(data["sets"]):
        if not isinstance(entry, Mapping):
            sets.append(entry)
            continue
        place: Path = ("data", "sets", number)
        low = {key: value for key, value in defaults.items() if key in _TO_SET}
        _borrow(homes, low, ("data", "defaults"), place, entry)
        own = {key: value for key, value in entry.items() if key not in _TO_SOURCE}
        resolved = _without_nulls(merged(low, own))
        if "batch_size" not in resolved:
            resolved["batch_size"] = batch_size
        if isinstance(entry.get("sources"), list):
            resolved["sources"] = [
                _source(source, entry, defaults, place, (*place, "sources", index), homes)
                for index, source in enumerate(entry["sources"])
            ]
        sets.append(resolved)
    kept = {key: value for key, value in data.items() if key not in ("defaults", "include")}
    return RawConfig(raw | {"data": kept | {"sets": sets}}, raw.origins, homes)


def _source(
    source: Any,
    entry: Mapping[str, Any],
    defaults: Mapping[str, Any],
    set_place: Path,
    place: Path,
    homes: dict[Path, Path],
) -> Any:
    if not isinstance(source, Mapping):
        return source
    from_defaults = {key: value for key, value in defaults.items() if key in _TO_SOURCE}
    from_set = {key: value for key, value in entry.items() if key in _TO_SOURCE}
    low = merged(from_defaults, from_set)
    _borrow(homes, from_set, set_place, place, source)
    _borrow(homes, from_defaults, ("data", "defaults"), place, merged(from_set, source))
    return _without_nulls(merged(low, source))


def _borrow(homes: dict[Path, Path], low: Mapping[str, Any], home: Path, place: Path, high: Mapping[str, Any]) -> None:
    """Note where inherited values were written: those of ``low`` that ``high`` does not have."""
    for path, _ in walk(low):
        value: Any = high
        for part in path:
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            homes[(*place, *path)] = (*home, *path)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    return value
