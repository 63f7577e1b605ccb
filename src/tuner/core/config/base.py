"""What every section of the configuration is made of."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

Dtype = Literal["bf16", "fp32"]
"""Names of the dtypes a configuration may ask for."""

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]

PERCENT = r"^\d+(\.\d+)?%$"
StepCount = Annotated[int, Field(ge=0)] | Annotated[str, StringConstraints(pattern=PERCENT)]
"""A number of optimizer updates, or a share of the planned total such as ``"5%"``. See ``steps_of``."""


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        serialize_by_alias=True,
    )


def changed_keys(section: Section) -> set[str]:
    """Keys whose value differs from the default: what a user asked for. A file that spells defaults out is fine."""
    fields = type(section).model_fields
    return {
        name
        for name in section.model_fields_set
        if getattr(section, name) != fields[name].get_default(call_default_factory=True)
    }


def is_int(value: Any) -> bool:
    """Whether ``value`` is a whole number; a boolean is not one here."""
    return isinstance(value, int) and not isinstance(value, bool)


def not_zero(value: float) -> float:
    """Validator of strengths."""
    if value == 0:
        raise ValueError("0 adds nothing; take the entry out")
    return value


def _every(value: Any) -> Any:
    return {"steps": value} if is_int(value) or isinstance(value, str) else value


class EveryFields(Section):
    """When something happens. A plain integer means steps; with several keys it happens whenever one of them is due."""

    steps: Annotated[int, Field(ge=1)] | Annotated[str, StringConstraints(pattern=PERCENT)] | None = None
    """Every so many optimizer updates, or a share of the total such as ``"10%"``."""
    epochs: Count | None = None
    """At the end of every so many epochs."""
    minutes: Positive | None = None
    """At the first update after so many minutes of wall-clock time."""


Every = Annotated[EveryFields, BeforeValidator(_every, json_schema_input_type=EveryFields | int | str)]
"""Field type of every ``every`` key: 250, ``"10%"`` or ``{"steps": 250, "epochs": 1, "minutes": 30}``."""


def steps_of(count: int | str, total: int) -> int:
    """``count`` as a number of updates: an integer is returned as it is, ``"5%"`` is that share of ``total``."""
    if isinstance(count, int):
        return count
    if not re.match(PERCENT, count):
        raise ValueError(f"not a number of steps: {count!r}")
    return int(Fraction(count[:-1]) * total / 100)
