"""Every value of a configuration with its origin: who set it, what it means, and what it would be otherwise."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tuner.core.config import ModelConfigBase, RawConfig, RunConfig, examine_config, resolve_defaults
from tuner.core.config.base import Section
from tuner.core.config.data import InheritedConfig
from tuner.core.config.describe import Key, as_json, default_words, meaning
from tuner.core.config.document import dotted, value_at
from tuner.core.config.inherit import resolve_data
from tuner.core.config.jsonc import Path
from tuner.core.errors import NotHereError, UsageError
from tuner.core.explain.costs import costs_of_value
from tuner.core.explain.find import Keys, names
from tuner.core.explain.keys import plain
from tuner.core.registry import family_of, model_schema, open_known
from tuner.core.types import ModelFacts

DEFAULT = "default"
FOLLOWS = {
    "data.sets[].batch_size": "train.batch_size",
    "network.alpha": "network.rank",
    "checkpoint.name": "checkpoint.dir",
    "checkpoint.dtype": "precision",
    "validate.seed": "train.seed",
}
"""Keys that take their value from another key when they are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One value in effect. text: as JSON. origin: a file and line, an option, a preset, a model, or ``default``.

    default: what it would be if it were left out, empty when it is required; changed: whether it was given and differs.
    measured: what it costs, where that was measured.
    """

    key: str
    value: Any
    text: str
    origin: str
    default: str
    changed: bool
    meaning: str
    measured: tuple[str, ...] = ()
    problems: tuple[UsageError, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        names = ("key", "value", "origin", "default", "changed", "meaning", "measured")
        return {name: getattr(self, name) for name in names} | {"problems": [str(each) for each in self.problems]}


@dataclass(kw_only=True)
class Explained:
    """All values of a configuration in the order of the schema; problems: everything that is wrong with it."""

    model: str
    values: list[Value] = field(default_factory=list)
    problems: list[UsageError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = [value.as_dict() for value in self.values]
        return asdict(self) | {"values": values, "problems": [str(each) for each in self.problems]}


def explain_config(raw: RawConfig, keys: Keys, only: Collection[Path] | None = None) -> Explained:
    """Every value in effect, or those of the keys in ``only`` and below. Problems are told, not raised.

    Nothing is fetched: without the weights, defaults of the model are those of its published form.
    """
    family = family_of(raw, keys.catalog)
    typed, problems = examine_config(raw, model_schema(keys.catalog, family))
    result = Explained(model=family, problems=problems)
    if typed is None:
        result.notes.append("defaults are shown once the problems are solved")
        result.values.extend(_given(raw, keys, family, problems, only))
        return result
    config, facts = _complete(typed, raw, keys, result)
    view = _View(raw, resolve_data(raw).homes, typed, config, facts, keys, family)
    document = config.model_dump(mode="json", by_alias=True)
    for path, value in _leaves(document):
        if not _is_passed_on(path) and _wanted(path, only):
            result.values.append(view.value(path, value, result.problems))
    return result


@dataclass(frozen=True)
class _View:
    """A configuration as it was written, typed, and completed by the facts of its model."""

    raw: RawConfig
    homes: Mapping[Path, Path]
    typed: RunConfig
    config: RunConfig
    facts: ModelFacts | None
    keys: Keys
    family: str

    def value(self, path: Path, value: Any, problems: list[UsageError]) -> Value:
        key = _key_of(path, self.keys, self.family)
        shared = _default_of(key, path)
        origin, given = self._origin(path, value, shared)
        default = self._left_out(path, shared) if given else value
        required = key is not None and key.field.is_required()
        return Value(
            key=dotted(path),
            value=value,
            text=as_json(value),
            origin=origin,
            default="" if required else as_json(default),
            changed=given and (required or value != default),
            meaning=_meaning(key),
            measured=tuple(str(each) for each in costs_of_value(dotted(path), value, shared)),
            problems=tuple(each for each in problems if _is_about(each, dotted(path))),
        )

    def _origin(self, path: Path, value: Any, default: Any) -> tuple[str, bool]:
        """Where a value comes from, and whether somebody gave it."""
        home = self.homes.get(path, path)
        place = _written_at(self.raw, home)
        # A short form, such as one number for ``every``, gives one key of its section.
        if place is not None and not (len(place) < len(home) and value == default):
            if path == ("cache", "dir") and not _is_written(self.raw, path):
                return DEFAULT, False
            origin = _place_of(self.raw, place)
            return (f"{origin}, {dotted(home)}" if home != path else origin), True
        pattern = ".".join("[]" if isinstance(part, int) else part for part in path).replace(".[]", "[]")
        if pattern in FOLLOWS and value != default:
            return f"from {FOLLOWS[pattern]}", False
        if self.facts is not None and value != _plain_value(value_at(_dumped(self.typed), path)):
            return f"{self.family} {self.facts.flavour}".rstrip(), False
        own = path[0] == "model" and str(path[-1]) not in ModelConfigBase.model_fields
        return (f"default of {self.family}" if own else DEFAULT), False

    def _left_out(self, path: Path, shared: Any) -> Any:
        """The value that a key would have if nobody gave it."""
        if shared is not None or self.facts is None or path[0] in ("model", "data"):
            return shared
        without = _without(self.typed, path)
        if without is None or path == ("checkpoint", "dir"):
            return shared
        formats = [self.config.checkpoint.format] if self.config.checkpoint.format else []
        resolved = resolve_defaults(without, self.facts, formats=formats)
        return value_at(_dumped(resolved), path)


def _complete(
    typed: RunConfig, raw: RawConfig, keys: Keys, result: Explained
) -> tuple[RunConfig, ModelFacts | None]:  # fmt: skip
    """The configuration with the defaults of its model where they can be known."""
    try:
        config, facts, absent = open_known(typed, keys.catalog, raw)
    except NotHereError as unknown:
        result.notes.append(f"defaults of the model are not known: {unknown.what}")
        return typed, None
    except UsageError as problem:
        result.problems.extend(problem.parts or (problem,))
        return typed, None
    if absent is not None:
        result.notes.append(
            f"{absent.where or absent.what} is not here: defaults are those of the published {facts.flavour}"
        )
    return config, facts


def _given(
    raw: RawConfig, keys: Keys, family: str, problems: list[UsageError], only: Collection[Path] | None
) -> Iterator[Value]:
    """What was written, for a configuration that is not one yet."""
    for path, value in _leaves(raw):
        if not _wanted(path, only) or (path == ("cache", "dir") and not _is_written(raw, path)):
            continue
        key = _key_of(path, keys, family)
        shared = _default_of(key, path)
        yield Value(
            key=dotted(path),
            value=value,
            text=as_json(value),
            origin=_place_of(raw, path),
            default="" if key is None or key.field.is_required() else plain(default_words(key.field)),
            changed=value != shared,
            meaning=_meaning(key),
            problems=tuple(each for each in problems if _is_about(each, dotted(path))),
        )


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Values that hold no further keys; lists of sections are gone through, other lists are values."""
    if isinstance(value, Mapping) and (value or not path):
        for key, below in value.items():
            yield from _leaves(below, (*path, key))
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        for index, below in enumerate(value):
            yield from _leaves(below, (*path, index))
    else:
        yield path, value


def _is_passed_on(path: Path) -> bool:
    """Whether a value only gives defaults to sources, where it is shown."""
    above = ("data", "defaults") if len(path) < 4 else ("data", "sets", path[2])
    return path[: len(above)] == above and (len(above) == 2 or path[3] in InheritedConfig.model_fields)


def _wanted(path: Path, only: Collection[Path] | None) -> bool:
    if only is None:
        return True
    plain_path = tuple(part for part in path if isinstance(part, str))
    return any(plain_path[: len(each)] == each for each in only)


def _key_of(path: Path, keys: Keys, family: str) -> Key | None:
    """The key of the schema at a path, or the one around a name of the user's."""
    wanted = names(dotted(path))
    found = (keys.look_up(wanted[:length], family) for length in range(len(wanted), 0, -1))
    return next((key for key in found if key is not None), None)


def _default_of(key: Key | None, path: Path) -> Any:
    """The shared default; nothing for an entry of a mapping."""
    if key is None or key.field.is_required() or key.alias != path[-1]:
        return None
    return _plain_value(key.field.get_default(call_default_factory=True))


def _plain_value(value: Any) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, Section):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, tuple | list):
        return [_plain_value(each) for each in value]
    return value


def _meaning(key: Key | None) -> str:
    return "" if key is None else plain(meaning(key.field.description))


def _written_at(raw: RawConfig, path: Path) -> Path | None:
    """The path itself when the document has it, the part of it that holds a short form, or None."""
    target: Any = raw
    for depth, part in enumerate(path):
        if isinstance(target, Mapping):
            if part not in target:
                return None
        elif not isinstance(target, list) or not isinstance(part, int) or part >= len(target):
            return path[:depth]
        target = target[part]
    return path


def _is_written(raw: RawConfig, path: Path) -> bool:
    """Whether somebody wrote this very key; reading a configuration fills in some places."""
    around = raw.origins.get(path[:-1], "")
    return path in raw.origins or around.startswith(("--set", "environment"))


def _place_of(raw: RawConfig, path: Path) -> str:
    return next((raw.origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in raw.origins), "given")


def _is_about(problem: UsageError, key: str) -> bool:
    where = problem.where or ""
    return problem.what.startswith((f"{key}:", f"{key} ")) or where == key or where.endswith(f", {key}")


def _dumped(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)


def _without(config: RunConfig, path: Path) -> RunConfig | None:
    """The configuration with one key back at its default; None where it lies in a list."""
    return _reset(config, path) if all(isinstance(part, str) for part in path) else None


def _reset(section: Any, path: Path) -> Any:
    if not isinstance(section, Section):
        return None
    fields = type(section).model_fields
    name = next((name for name, each in fields.items() if (each.alias or name) == path[0]), None)
    if name is None:
        return None
    if len(path) == 1:
        value = None if fields[name].is_required() else fields[name].get_default(call_default_factory=True)
    else:
        value = _reset(getattr(section, name), path[1:])
    return None if value is None and len(path) > 1 else section.model_copy(update={name: value})
