"""From a merged document to the typed, complete configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError, create_model

from tuner.core.config.base import Section
from tuner.core.config.checks import key_problems
from tuner.core.config.data import DefaultsConfig, InheritedConfig
from tuner.core.config.document import RawConfig
from tuner.core.config.inherit import resolve_data
from tuner.core.config.jsonc import Path
from tuner.core.config.load import load_config
from tuner.core.config.messages import validation_errors
from tuner.core.config.model import ModelConfigBase
from tuner.core.config.planned import unusable_keys
from tuner.core.config.run import RunConfig
from tuner.core.errors import Problems, UsageError


@cache
def run_schema(model: type[ModelConfigBase] = ModelConfigBase) -> type[RunConfig]:
    """The configuration class whose ``model`` section is the plugin's."""
    if model is ModelConfigBase:
        return RunConfig
    return create_model("RunConfig", __base__=RunConfig, __doc__=RunConfig.__doc__, model=(model, ...))


def build_config(raw: Mapping[str, Any], model: type[ModelConfigBase] = ModelConfigBase) -> RunConfig:
    """Check a document and give it types. Raises one UsageError that lists every problem found.

    ``raw`` is what ``load_config`` returned; relative paths in a plain dict start at the current folder.
    """
    config, found = examine_config(raw, model)
    problems = Problems()
    problems.extend(found)
    problems.raise_if_any()
    assert config is not None
    return config


def examine_config(
    raw: Mapping[str, Any], model: type[ModelConfigBase] = ModelConfigBase
) -> tuple[RunConfig | None, list[UsageError]]:
    """Like ``build_config`` without raising: the configuration, None when it has no types, and every problem found."""
    document = raw if isinstance(raw, RawConfig) else load_config(raw, env={})
    schema = run_schema(model)
    found: dict[str, tuple[Path, UsageError]] = {}
    for path, error in unusable_keys(document):
        found.setdefault(str(error), (path, error))
    usable = _without(document, [path for path, _ in found.values()])
    resolved = resolve_data(usable)
    for path, error in _inherited_errors(usable):
        found.setdefault(str(error), (path, error))
    config: RunConfig | None = None
    try:
        config = schema.model_validate_json(json.dumps(resolved), strict=True)
    except ValidationError as error:
        for path, problem in validation_errors(error, resolved, schema):
            found.setdefault(str(problem), (path, problem))
    problems = [error for _, error in found.values()]
    if config is not None:
        problems.extend(key_problems(config, resolved))
    return config, problems


def _inherited_errors(raw: RawConfig) -> Iterator[tuple[Path, UsageError]]:
    """Problems of ``data.defaults`` and of what sets give to their sources: values that every source overrides are
    checked as well."""
    data = raw.get("data")
    if not isinstance(data, Mapping):
        return
    if data.get("defaults") is not None:
        yield from _section_errors(DefaultsConfig, data["defaults"], ("data", "defaults"), raw)
    sets = data.get("sets")
    for number, entry in enumerate(sets if isinstance(sets, list) else []):
        if isinstance(entry, Mapping):
            passed_on = {key: value for key, value in entry.items() if key in InheritedConfig.model_fields}
            yield from _section_errors(InheritedConfig, passed_on, ("data", "sets", number), raw)


def _section_errors(schema: type[Section], value: Any, home: Path, raw: RawConfig) -> list[tuple[Path, UsageError]]:
    try:
        schema.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return validation_errors(error, raw, RunConfig, home=home)
    return []


def _without(raw: RawConfig, paths: list[Path]) -> RawConfig:
    """A copy without the given keys, so that each is reported once."""
    result = RawConfig(json.loads(json.dumps(raw)), raw.origins)
    for path in sorted(paths, key=len, reverse=True):
        target: Any = result
        for part in path[:-1]:
            target = target[part]
        if isinstance(target, dict):
            del target[path[-1]]
        else:
            target[path[-1]] = None
    return result
