"""The keys of a plugin's ``model`` section that are asked for, as questions: whatever a plugin declares with `Ask`."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo

from tuner.core.config.document import loose_value
from tuner.core.config.model import ComponentSource, ModelConfigBase
from tuner.core.errors import UsageError
from tuner.core.types import Ask
from tuner.core.wizard.questions import Option, Question


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


def question_of(key: AskedKey, now: Any = None) -> Question[Any]:
    """The question for a plain value. now: the value that an existing configuration has."""
    default = key.field.get_default(call_default_factory=True) if now is None else now
    annotation = without_none(key.field.annotation)
    blank: Question[Any] = Question(
        id=f"model.{key.name}",
        text=key.ask.question,
        help=plain_help(key),
        read=partial(_read, key),
        default=None if default is None else str(default),
    )
    if annotation is bool:
        return replace(blank, kind="confirm", read=bool, default=default)
    if get_origin(annotation) is Literal:
        options = tuple(Option(value=str(each), title=str(each)) for each in get_args(annotation))
        values = {str(each): each for each in get_args(annotation)}
        return replace(blank, kind="choice", read=values.__getitem__, options=options)
    return blank


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


def without_none(annotation: Any) -> Any:
    """``X`` for ``X | None``, and for ``Annotated[X, ...]``."""
    if get_origin(annotation) is Annotated:
        return without_none(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kept = [each for each in get_args(annotation) if each is not type(None)]
        return without_none(kept[0]) if len(kept) == 1 else annotation
    return annotation


def _read(key: AskedKey, raw: Any) -> Any:
    annotation: Any = key.field.annotation
    model = create_model("Answer", value=(annotation, key.field))
    text = str(raw).strip()
    problem = ""
    for value in (loose_value(text), text):
        try:
            found = model.model_validate({"value": value}, strict=True)
        except ValidationError as error:
            problem = problem or error.errors()[0]["msg"]
        else:
            return found.model_dump(mode="json")["value"]
    raise UsageError(f"this will not do: {problem}", fix=key.field.description)
