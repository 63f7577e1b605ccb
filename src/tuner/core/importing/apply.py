"""From options to keys, by the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuner.core.config.foreign import ForeignOption, Refused, Settings, literal
from tuner.core.config.jsonc import Path
from tuner.core.config.messages import nearest
from tuner.core.config.planned import names_secret
from tuner.core.importing.report import Row, Status
from tuner.core.importing.source import Given, shown_value

HIDDEN = "***"
_TRUE = {"true", "1", "yes", "on"}
_FALSE = {"false", "0", "no", "off", ""}


class Table:
    """Options by every spelling; of rows with one name the first wins, so a model's own come before the shared."""

    def __init__(self, options: Iterable[ForeignOption]) -> None:
        self.by_name: dict[str, ForeignOption] = {}
        self.options: list[ForeignOption] = []
        for option in options:
            new = [name for name in option.names if name not in self.by_name]
            if option.names[0] in new:
                self.options.append(option)
            for name in new:
                self.by_name[name] = option

    def find(self, name: str) -> ForeignOption | None:
        found = self.by_name.get(name)
        while found is None and "." in name:
            name = name.rpartition(".")[0]
            found = self.by_name.get(f"{name}.*")
        return found


@dataclass(slots=True)
class Translation:
    """A configuration in the making, with the rows of the report."""

    config: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def put(self, key: str, value: Any) -> list[Path]:
        """Write a value at a dotted key; ``key[]`` adds to a list. Returns the places it went to."""
        adding = key.endswith("[]")
        *above, last = key.removesuffix("[]").split(".")
        target = self.config
        for part in above:
            target = target.setdefault(part, {})
        if not adding:
            target[last] = value
            return [(*above, last)]
        entries = target.setdefault(last, [])
        new = value if isinstance(value, list) else [value]
        entries.extend(new)
        return [(*above, last, index) for index in range(len(entries) - len(new), len(entries))]

    def add(
        self,
        given: Given,
        status: Status,
        note: str = "",
        keys: Mapping[str, Any] | None = None,
    ) -> Row:
        """A row, and the keys that it sets. Secrets are not shown: reports are passed on."""
        value = HIDDEN if names_secret(given.name) else given.value
        row = Row(given.where, given.label, value, status, note=note, name=given.name)
        for key, value in (keys or {}).items():
            row.keys += self.put(key, value)
        self.rows.append(row)
        return row


def read_value(option: ForeignOption, value: Any) -> Any:
    """A value as the option's kind says. Raises ValueError for a text that is none."""
    if option.kind == "list":
        return list(value) if isinstance(value, list | tuple) else [value]
    if isinstance(value, list) and option.kind != "any":
        if len(value) > 1:
            raise ValueError("more than one value")
        value = value[0] if value else True
    elif isinstance(value, list) and all(isinstance(each, str) for each in value) and len(value) < 2:
        value = value[0] if value else True
    if value is None or (isinstance(value, str) and value.lower() == "none" and option.kind != "flag"):
        return None if None in option.off else value
    if option.kind == "flag":
        return read_flag(value)
    if option.kind in ("int", "float"):
        if value is True:
            raise ValueError("a value is missing")
        number = float(value)
        if option.kind == "float":
            return number
        if number != int(number):
            raise ValueError(f"{value!r} is not a whole number")
        return int(number)
    if option.kind == "literal" and isinstance(value, str):
        return literal(value)
    if option.kind == "text":
        if value is True:
            raise ValueError("a value is missing")
        return str(value)
    return value


def read_flag(value: Any) -> bool:
    """A switch as a file or a command line says it. Raises ValueError for what is none."""
    text = str(value).lower()
    if text not in _TRUE | _FALSE:
        raise ValueError(f"{value!r} is neither true nor false")
    return text in _TRUE


def outcome(option: ForeignOption, value: Any, values: Mapping[str, Any]) -> Settings | Refused:
    """What one option becomes."""
    if any(value is off or (value == off and type(value) is type(off)) for off in option.off):
        return Settings({}, "off, as here" if not option.refused else "not asked for")
    if option.refused:
        return Refused(option.refused, option.note)
    if option.needs is not None:
        other, wanted = option.needs
        if values.get(other) not in wanted if wanted else not values.get(other):
            words = [each for each in wanted if isinstance(each, str)]
            which = " or ".join(words) if len(words) == len(wanted) < 4 else ""
            return Refused("not_applicable", f"without {other} {which}".rstrip() + " it does nothing there either")
    if option.convert is not None:
        return option.convert(value, values)
    made = option.values.get(value, value) if isinstance(value, str | int | float | bool) else value
    if isinstance(made, Refused | Settings):
        return made
    return Settings({option.key: made} if option.key else {})


def translate(
    into: Translation, given: Sequence[Given], table: Table, *, defaults: bool = True, facts: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """A row for every option of ``given``, later ones winning, then the defaults that differ. Returns the values.

    facts: pseudo options that conversions may look at; a default whose option is among them is not applied.
    """
    found = [(each, table.find(each.name)) for each in given]
    values: dict[str, Any] = dict(facts)
    last: dict[str, Given] = {}
    wrong: dict[int, str] = {}
    for each, option in found:
        if option is None:
            continue
        name = _name(option, each)
        try:
            values[name] = read_value(option, each.value)
            last[name] = each
        except (ValueError, TypeError) as error:
            wrong[id(each)] = str(error)
    for each, option in found:
        if option is None:
            guess = nearest(each.name, [name for name in table.by_name if not name.endswith(".*")])
            near = f"did you mean {guess}?" if guess else "no option of that program is known under this name"
            into.add(each, "unknown", near)
        elif id(each) in wrong:
            into.add(each, "refused", wrong[id(each)])
        elif last[_name(option, each)] is not each:
            into.add(each, "mapped", f"given again in {last[_name(option, each)].where}, which wins")
        else:
            _one(into, each, option, values)
    if defaults:
        for option in table.options:
            wanted = option.default_with is None or bool(values.get(option.default_with))
            if option.default is not None and option.names[0] not in values and wanted:
                _default(into, option, values)
    return values


def _name(option: ForeignOption, given: Given) -> str:
    return given.name if option.names[0].endswith(".*") else option.names[0]


def _one(into: Translation, given: Given, option: ForeignOption, values: Mapping[str, Any]) -> None:
    name = _name(option, given)
    try:
        made = outcome(option, values[name], {**values, "*": name})
    except (ValueError, TypeError) as error:
        into.add(given, "refused", str(error))
        return
    if isinstance(made, Refused):
        into.add(given, made.status, made.why)
        return
    changed = made.changed or (option.changed and bool(made.keys))
    # A note on a default is about runs that do not give the option.
    note = made.note or (option.note if changed or option.default is None else "")
    into.add(given, "changed" if changed else "mapped", note, made.keys)


def _default(into: Translation, option: ForeignOption, values: Mapping[str, Any]) -> None:
    made = outcome(option, option.default, values)
    if isinstance(made, Refused) or not (made.keys or made.changed):
        return
    shown = shown_value(option.default)
    note = made.note or option.note or f"{option.names[0]} is {shown} there unless it is given"
    status: Status = "default" if made.keys else "changed"
    into.add(Given(option.names[0], option.default, "default"), status, note, made.keys)
