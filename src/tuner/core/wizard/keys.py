"""The keys of a plugin's ``model`` section that are asked for, as questions: whatever a plugin declares with `Ask`."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo

from tuner.core.config.document import loose_value
from tuner.core.config.model import ComponentSource, ModelConfigBase
from tuner.core.errors import UsageError
from tuner.core.types import Ask
from tuner.core.wizard.questions import NOTHING, Option, Question


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedKey:
    """name: the key. ask: what the plugin says about it. entries: of a dictionary, the keys that its type allows."""

    name: str
    ask: Ask
    field: FieldInfo
    is_place: bool
    is_table: bool
    entries: tuple[str, ...] = ()


def asked_keys(schema: type[ModelConfigBase]) -> Iterator[AskedKey]:
    """Keys that a plugin asks for, in the order of its fields; those it refuses are left out."""
    for name, field in schema.model_fields.items():
        ask = next((each for each in field.metadata if isinstance(each, Ask)), None)
        if ask is None or name in schema.unused:
            continue
        annotation = without_none(field.annotation)
        is_table = get_origin(annotation) is dict
        inner = get_args(annotation) if is_table else ()
        yield AskedKey(
            name=name,
            ask=ask,
            field=field,
            is_place=ask.weights or ComponentSource in (annotation, *inner[1:]),
            is_table=is_table,
            entries=get_args(inner[0]) if inner and get_origin(inner[0]) is Literal else (),
        )


def question_of(key: AskedKey, now: Any = None, *, entry: str = "", required: bool = False) -> Question[Any]:
    """The question for a plain value. now: the value that an existing configuration has. entry: of a dictionary, the
    key that is asked for. required: whether nothing, though the type allows it, will not do."""
    annotation: Any = key.field.annotation
    default = key.field.get_default(call_default_factory=True)
    if entry:
        annotation = get_args(without_none(annotation))[1]
        default = default.get(entry) if isinstance(default, Mapping) else None
    plain = without_none(annotation)
    is_optional = _takes_none(annotation) and not required
    default = default if now is None else now
    blank: Question[Any] = Question(
        id=".".join(filter(None, ("model", key.name, entry))),
        text=key.ask.question.format(name=entry),
        help=plain_help(key),
        read=partial(_read, key, annotation, is_optional=is_optional),
        default=(NOTHING if is_optional else None) if default is None else _typed(default),
    )
    if plain is bool and not is_optional:
        return replace(blank, kind="confirm", read=bool, default=default if isinstance(default, bool) else None)
    listed = (True, False) if plain is bool else get_args(plain) if get_origin(plain) is Literal else ()
    if not listed:
        return blank
    values: dict[str, Any] = {_typed(each): each for each in listed} | ({NOTHING: None} if is_optional else {})
    options = tuple(Option(value=name, title=name if name != NOTHING else f"{NOTHING} (none)") for name in values)
    return replace(
        blank,
        kind="choice",
        read=values.__getitem__,
        options=options,
        default=blank.default if blank.default in values else None,
    )


def _typed(value: Any) -> str:
    """A value as it is typed: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def plain_help(key: AskedKey) -> str:
    """The key's docstring on one line."""
    return " ".join((key.field.description or "").replace("``", "").split())


def missing_key(problem: UsageError, keys: list[AskedKey]) -> tuple[AskedKey, str] | None:
    """(key, entry of it or "") that a problem names as its place, as in ``model.text_encoders.NAME.path``."""
    for part in (problem, *problem.parts):
        for key in keys:
            pattern = rf"(?:.*, )?model\.{re.escape(key.name)}(?:\.(?P<entry>\w+))?(?:\.path)?(?:: .*)?"
            match = re.fullmatch(pattern, part.where or "")
            if match is not None:
                entry = match["entry"] or ""
                return key, "" if entry == "path" else entry
    return None


def _takes_none(annotation: Any) -> bool:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)


def without_none(annotation: Any) -> Any:
    """``X`` for ``X | None``, and for ``Annotated[X, ...]``."""
    if get_origin(annotation) is Annotated:
        return without_none(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kept = [each for each in get_args(annotation) if each is not type(None)]
        return without_none(kept[0]) if len(kept) == 1 else annotation
    return annotation


def _read(key: AskedKey, annotation: Any, raw: Any, *, is_optional: bool) -> Any:
    text = str(raw).strip()
    if is_optional and text == NOTHING:
        return None
    # Rules of the field itself, such as limits, are about the whole value, not about one entry of a dictionary.
    whole = annotation is key.field.annotation
    model = create_model("Answer", value=(annotation, key.field if whole else ...))
    problem = ""
    for value in (loose_value(text), text):
        try:
            found = model.model_validate_json(json.dumps({"value": value}), strict=True)
        except ValidationError as error:
            problem = problem or error.errors()[0]["msg"]
        else:
            return found.model_dump(mode="json")["value"]
    raise UsageError(f"this will not do: {problem}", fix=plain_help(key) or None)
