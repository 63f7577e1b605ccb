"""What a key needs and excludes: found by trying its values in a minimal configuration, alone and with other keys.

The rules are those of ``core.config.checks`` themselves, so what is told here is what a run would say. Rules that need
the facts of a model are not tried.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from pydantic import BaseModel, ValidationError

from tuner.core.config import EveryFields, RawConfig, RunConfig
from tuner.core.config.base import Section
from tuner.core.config.checks import key_problems
from tuner.core.config.data import DefaultsConfig
from tuner.core.config.describe import INHERITED, Key, as_json, choices
from tuner.core.config.document import merged
from tuner.core.explain.find import core_keys

_BASE: Mapping[str, Any] = {
    "model": {"family": "any", "path": "weights.safetensors"},
    "data": {"sets": [{"batch_size": 1, "sources": [{"id": "a", "path": "a"}]}]},
    "optimizer": {"lr": 1e-4},
    "train": {"steps": 100},
    "checkpoint": {"dir": "out"},
}
_SAMPLES: tuple[Any, ...] = (
    True, False, 2, 64, 0.5, "x", "5%", ["x"], [2], [64, 64], {"x": 2}, {"x": True}, {"x": "x"}, {"x": "bf16"},
    {"x": 0.5}, {"x": "int8"}, {"steps": 2}, {"norm": 2.0}, {"path": "x"}, [{"match": "x"}], [[0.5, "x"]],
)  # fmt: skip
_REPLACED = {"train.steps": ("train.epochs",), "train.epochs": ("train.steps",)}
"""Keys of the minimal configuration that give way to one that is tried."""
Problems = frozenset[tuple[str, str]]
"""(keys and what is wrong with them, what to do)."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """What is wrong with ``keys``, and what to do, when the key that was asked about has one of ``values`` (as JSON).

    values: empty for anything but the default.
    """

    values: tuple[str, ...]
    keys: tuple[str, ...]
    problem: str
    fix: str

    def __str__(self) -> str:
        given = f"{' or '.join(self.values)}: " if self.values else ""
        return f"{given}{', '.join(self.keys)}: {self.problem}{f' ({self.fix})' if self.fix else ''}"


def conflicts(path: str) -> list[Conflict]:
    """What the checks have against values of a key, alone and beside one other key."""
    found: dict[tuple[str, str], tuple[dict[str, None], set[str]]] = {}
    tried = [each for each in _alone() if each[0] == path]
    for _, value, alone in tried:
        problems = {(_general(told, value), fix) for told, fix in alone}
        for other, second, apart in _alone():
            if other.split(".")[0] != "model" and not _related(path, other):
                new = (_problems_with({path: value, other: second}) or frozenset()) - alone - apart
                problems |= {(_general(told, value, second), fix) for told, fix in new}
        for told, fix in sorted(problems):
            key, _, what = told.partition(": ")
            values, keys = found.setdefault((what, fix), ({}, set()))
            values[as_json(value)] = None
            keys.add(key)
    listed = {as_json(value) for key in core_keys() if key.path == path for value in choices(key.section, key.name)}
    return [
        Conflict(tuple(each for each in values if each in listed), tuple(sorted(keys)), what, fix)
        for (what, fix), (values, keys) in found.items()
    ]


def _general(told: str, *values: Any) -> str:
    """A message without the values that were tried, so that those of several values can be told once."""
    for value in values:
        if isinstance(value, str):
            told = told.replace(f"{value!r}", "'...'", 1)
    return told


def needed_by(path: str) -> list[str]:
    """Keys that the checks refuse alone and accept beside some value of this key."""
    found: dict[str, None] = {}
    values = [value for other, value, alone in _alone() if other == path and not alone]
    for other, second, apart in _alone():
        if not apart or _related(path, other):
            continue
        if any(_problems_with({path: value, other: second}) == frozenset() for value in values):
            found[other] = None
    return list(found)


def _related(path: str, other: str) -> bool:
    """Whether one lies inside the other, so that trying both would say nothing."""
    return path == other or path.startswith((f"{other}.", f"{other}[")) or other.startswith((f"{path}.", f"{path}["))


@cache
def _alone() -> tuple[tuple[str, Any, Problems], ...]:
    """Every key with values that differ from its default, and what is wrong with each alone."""
    found = []
    for key in core_keys():
        if _is_tried(key):
            for value in _values(key):
                problems = _problems_with({key.path: value})
                if problems is not None:
                    found.append((key.path, value, problems))
    return tuple(found)


def _is_tried(key: Key) -> bool:
    inherited = key.field.description in INHERITED or key.section in (DefaultsConfig, EveryFields)
    section = any(issubclass(each, Section) and each is not EveryFields for each in key.inner)
    return not (inherited or section or key.path.startswith("data.defaults") or ".*" in key.path)


def _values(key: Key) -> Iterator[Any]:
    """Values that the schema allows, the default left out: the listed ones, and one more."""
    listed = choices(key.section, key.name)
    default = None if key.field.is_required() else key.field.get_default(call_default_factory=True)
    yield from (value for value in listed if value != default)
    others = (value for value in _SAMPLES if value not in listed and value != default)
    yield from islice((value for value in others if _problems_with({key.path: value}) is not None), 1)


def _problems_with(settings: Mapping[str, Any]) -> Problems | None:
    """What is wrong with the minimal configuration and these keys; None when a value has the wrong type."""
    document: dict[str, Any] = json.loads(json.dumps(_BASE))
    for path, value in settings.items():
        for gone in _REPLACED.get(path, ()):
            section, name = gone.split(".")
            if gone not in settings:
                document[section].pop(name, None)
        document = _put(document, path, value)
    try:
        config = RunConfig.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
        if any(each["type"] != "value_error" for each in found):
            return None
        # A rule of one section; where it is, is said by the words.
        return frozenset((f"{_dotted(each['loc'])}: {each['ctx']['error']}", "") for each in found)
    problems = key_problems(config, RawConfig())
    return frozenset((each.what.replace("[0]", "[]"), each.fix or "") for each in problems)


def _dotted(location: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in location if isinstance(part, str) and part[:1].islower())


def _put(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The document with ``value`` at ``path``; what has to be there on the way is made."""
    head, dot, rest = path.partition(".")
    name = head.removesuffix("[]")
    if not dot:
        return document | {name: value}
    if head.endswith("[]"):
        entries = document.get(name) or [_blank(name)]
        return document | {name: [_put(entries[0], rest, value), *entries[1:]]}
    inside = document.get(name)
    return document | {name: _put(inside if isinstance(inside, dict) else {}, rest, value)}


def _blank(name: str) -> dict[str, Any]:
    """The least that an entry of a list of sections has to have."""
    section = next((each for key in core_keys() if key.alias == name for each in key.inner), BaseModel)
    return merged({}, {field.alias or key: _sample(field.annotation) for key, field in section.model_fields.items()
                       if field.is_required()})  # fmt: skip


def _sample(annotation: Any) -> Any:
    return "x" if annotation is str else 1
