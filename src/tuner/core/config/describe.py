"""The schema as a reader sees it: every key with its type in words, its default and its meaning."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

INHERITED = {"See the source.": "data.sets[].sources[]", "See the set.": "data.sets[]"}
"""Docstrings of keys that give a value to places further in, and those places."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the schema. path: ``data.sets[].sources[].repeats``, ``[]`` for entries of lists and ``.*`` for names.

    section: the class it is a field of; name: the attribute there.
    """

    path: str
    section: type[BaseModel]
    name: str

    @property
    def field(self) -> FieldInfo:
        return self.section.model_fields[self.name]

    @property
    def alias(self) -> str:
        """The key as it is written in a file."""
        return self.field.alias or self.name

    @property
    def inner(self) -> list[type[BaseModel]]:
        """The sections that a value of this key is made of."""
        return sections_in(self.field.annotation)


def schema_keys(schema: type[BaseModel], path: str = "") -> Iterator[Key]:
    """Every key below ``path``, sections before what is in them."""
    for name, field in schema.model_fields.items():
        here = f"{path}.{field.alias or name}" if path else field.alias or name
        yield Key(here, schema, name)
        for inner in sections_in(field.annotation):
            yield from schema_keys(inner, f"{here}{entry_suffix(field.annotation)}")


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes in a type, through unions, lists and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections_in(part)]


def entry_suffix(annotation: Any) -> str:
    """What stands between a key and the keys of its entries: ``[]`` for a list, ``.*`` for a mapping."""
    text = str(annotation)
    return "[]" if "tuple[tuner" in text else ".*" if "dict[" in text else ""


def type_words(section: type[BaseModel], name: str) -> str:
    """The type of a key as Markdown, from the JSON schema, which is what the file has to satisfy."""
    schema, definitions = _json_schema(section)
    return _words(schema["properties"][section.model_fields[name].alias or name], definitions)


def choices(section: type[BaseModel], name: str) -> list[Any]:
    """The values that a key allows when they are listed in the schema, in its order; else nothing."""
    schema, definitions = _json_schema(section)
    return list(dict.fromkeys(_choices(schema["properties"][section.model_fields[name].alias or name], definitions)))


def default_words(field: FieldInfo) -> str:
    """The default as Markdown."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return f"`{as_json(changed)}`" if changed else "its defaults"
    return "none" if value is None else f"`{as_json(value)}`"


def meaning(text: str | None) -> str:
    """A docstring as one line of Markdown."""
    return " ".join(inspect.cleandoc(text or "").replace("``", "`").split())


def as_json(value: Any) -> str:
    """A value as it would be written in a file; sections by their keys."""
    return json.dumps(value, ensure_ascii=False, default=lambda each: each.model_dump(mode="json"))


@cache
def _json_schema(section: type[BaseModel]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The JSON schema of a section, and what it refers to."""
    document = section.model_json_schema(by_alias=True, mode="validation")
    definitions = document.get("$defs", {})
    if "properties" not in document:
        document = definitions[document["$ref"].rsplit("/", 1)[1]]
    return document, definitions


def _words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return "every" if name == "EveryFields" else _words(definitions[name], definitions)
    if "anyOf" in schema:
        words = dict.fromkeys(_words(each, definitions) for each in schema["anyOf"])
        return "every or null" if "every" in words and "null" in words else " or ".join(words)
    if "const" in schema:
        return f'`"{schema["const"]}"`'
    if "enum" in schema:
        return " or ".join(f'`"{value}"`' for value in schema["enum"])
    kind: str = schema.get("type", "any value")
    if kind == "array":
        entry = _words(schema.get("items") or (schema.get("prefixItems") or [{}])[0], definitions)
        return f"list of ({entry})" if " or " in entry else f"list of {entry}"
    return {"string": "text", "boolean": "true or false"}.get(kind, kind) + _limits(schema)


def _limits(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[key]:g}" for key, word in signs.items() if key in schema]
    if "%" in schema.get("pattern", ""):
        return ' such as `"5%"`'
    return f" {', '.join(limits)}" if limits else ""


def _choices(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[Any]:
    if "$ref" in schema:
        yield from _choices(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    for each in schema.get("anyOf", ()):
        yield from _choices(each, definitions)
    if "const" in schema:
        yield schema["const"]
    yield from schema.get("enum", ())
    if schema.get("type") == "boolean":
        yield from (True, False)
