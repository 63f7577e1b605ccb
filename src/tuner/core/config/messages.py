"""What pydantic found, in words a user can act on: one error per place, with the nearest name for a misspelt key."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tuner.core.config.base import PERCENT
from tuner.core.config.document import RawConfig, dotted, value_at
from tuner.core.config.jsonc import Path
from tuner.core.errors import UsageError

_NEEDS_KEY = ("extra_forbidden", "missing")


def validation_errors(
    error: ValidationError, raw: RawConfig, schema: type[BaseModel], home: Path = ()
) -> list[tuple[Path, UsageError]]:
    """One error per place of the document. ``home`` is where in the document the validated part is."""
    places: dict[Path, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        detail["loc"] = (*home, *detail["loc"])
        places.setdefault(_place(detail, raw), []).append(detail)
    found: dict[Path, UsageError] = {}
    for place, details in places.items():
        # A branch of a union that got further into the value explains more than one that did not match at all.
        if any(len(other) > len(place) and other[: len(place)] == place for other in places) and _mismatch(details):
            continue
        home = raw.homes.get(place, place)
        found.setdefault(home, _one(place, home, details, raw, schema))
    return list(found.items())


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was probably meant to be."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def known_keys(schema: type[BaseModel], path: Path) -> list[str]:
    """JSON names of the keys that the schema knows inside ``path``."""
    classes = [schema]
    for part in path:
        if isinstance(part, int):
            continue
        fields = [field for cls in classes for name, field in cls.model_fields.items() if part in (field.alias, name)]
        if fields:
            classes = [cls for field in fields for cls in _models(field.annotation)]
    return [field.alias or name for cls in classes for name, field in cls.model_fields.items()]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if hasattr(annotation, "__value__"):
        return _models(annotation.__value__)
    return [cls for argument in typing.get_args(annotation) for cls in _models(argument)]


def _place(detail: ErrorDetails, raw: RawConfig) -> Path:
    """The path in the document. Locations also name branches of unions, which are no keys; those are left out."""
    value: Any = raw
    place: list[str | int] = []
    location = detail["loc"]
    for index, part in enumerate(location):
        inside = isinstance(value, Mapping) and part in value
        inside |= (
            isinstance(value, Sequence) and not isinstance(value, str) and isinstance(part, int) and part < len(value)
        )
        if inside:
            place.append(part)
            value = value[part]
        elif index == len(location) - 1 and detail["type"] in _NEEDS_KEY:
            place.append(part)
    return tuple(place)


def _mismatch(details: Sequence[ErrorDetails]) -> bool:
    """Whether the value as a whole did not fit. A list whose entries are wrong counts as too short as well."""
    return all(d["type"] in ("literal_error", "too_short") or d["type"].endswith("_type") for d in details)


def _one(
    place: Path, home: Path, details: Sequence[ErrorDetails], raw: RawConfig, schema: type[BaseModel]
) -> UsageError:
    """The error for one place. ``home`` is where an inherited value was written."""
    given = value_at(raw, place)
    if len(details) == 1 and details[0]["type"] == "value_error" and isinstance(given, Mapping):
        reason = str(details[0]["ctx"]["error"])
        # Checks of a whole section begin with the key they are about.
        key = reason.split()[0]
        return UsageError(f"{dotted(home)}: {reason}", where=raw.where((*home, key) if key in given else home))
    types = {detail["type"] for detail in details}
    if "extra_forbidden" in types:
        name, known = str(place[-1]), known_keys(schema, place[:-1])
        guess = nearest(name, known)
        inside = f" in {dotted(home[:-1])}" if home[:-1] else ""
        fix = f"did you mean {guess!r}?" if guess else f"known keys: {', '.join(known)}" if known else None
        return UsageError(f"unknown key {name!r}{inside}", where=raw.where(home), fix=fix)
    if "missing" in types:
        return UsageError(f"the key {dotted(home)!r} is required", where=raw.where(home[:-1]) or None)
    reasons = list(dict.fromkeys(_reason(detail) for detail in details))
    wanted = [reason.removeprefix("expected ") for reason in reasons if reason.startswith("expected ")]
    others = [reason for reason in reasons if not reason.startswith("expected ")]
    if wanted:
        others.insert(0, f"expected {' or '.join(wanted)}, got {_show(given)}")
    elif not isinstance(given, Mapping):
        others[-1] += f", got {_show(given)}"
    return UsageError(f"{dotted(home) or 'the document'}: {'; '.join(others)}", where=raw.where(home))


_KINDS = {
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "string_type": "expected text",
    "dict_type": "expected an object",
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "finite_number": "expected a finite number",
}


_PATTERNS = {
    PERCENT: 'a share such as "5%"',
    r"^\d+-\d+$": 'a range such as "4-7"',
    r"^[^/\\]+$": "a name without slashes",
}


def _reason(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _KINDS:
        return _KINDS[kind]
    if kind == "literal_error":
        return f"expected {str(context['expected']).replace(chr(39), chr(34))}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        word = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below"}.get(kind, "at most")
        return f"expected a number {word} {next(iter(context.values())):g}"
    if kind == "too_short":
        return f"expected at least {context['min_length']} entries"
    if kind == "too_long":
        return f"expected at most {context['max_length']} entries"
    if kind == "string_too_short":
        return "expected text that is not empty"
    if kind == "string_pattern_mismatch":
        return f"expected {_PATTERNS.get(context['pattern'], 'text that matches ' + context['pattern'])}"
    if kind == "value_error":
        return str(context["error"])
    return detail["msg"]


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value)
