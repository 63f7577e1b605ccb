"""From what somebody types to keys of the schema, models' own keys included."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tuner.core.config import ModelConfigBase, RunConfig, run_schema
from tuner.core.config.describe import Key, schema_keys
from tuner.core.config.jsonc import Path
from tuner.core.config.planned import refusal
from tuner.core.errors import UsageError
from tuner.core.registry import MODELS, Catalog, model_schema

_NAME = re.compile(r"[^.\[\]*\s]+")


@dataclass(frozen=True, slots=True)
class Found:
    """A key. refused: (``planned`` or ``not applicable``, reason) for one that is known and cannot be used.

    models: the models whose key it is alone; empty for a key of every model. key: None for a refused one.
    """

    path: str
    key: Key | None
    models: tuple[str, ...] = ()
    refused: tuple[str, str] | None = None


@dataclass
class Keys:
    """All keys of the schema, by their names without places in lists.

    published: by model and flavour, the smallest configuration with every default; filled when it is asked for.
    """

    catalog: Catalog
    shared: dict[Path, Key] = field(default_factory=dict)
    own: dict[Path, dict[str, Key]] = field(default_factory=dict)
    published: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in core_keys():
            # A key of ``data.defaults`` and of a set is explained where it has its effect; both are found.
            self.shared.setdefault(names(key.path), key)
        for entry in self.catalog.entries(MODELS):
            for key in model_keys(self.catalog, entry.name):
                if key.name in key.section.__annotations__ or key.name not in ModelConfigBase.model_fields:
                    self.own.setdefault(names(key.path), {})[entry.name] = key

    def find(self, text: str) -> list[Found]:
        """The key that ``text`` names, with or without places in lists; else every key that ends with it.

        Raises UsageError, which names similar keys, when there is none.
        """
        wanted = names(text)
        if found := self._exact(wanted):
            return [found]
        ends = [path for path in (*self.shared, *self.own) if wanted and path[-len(wanted) :] == wanted]
        found_ends = {found.path: found for path in ends if (found := self._exact(path))}
        if found_ends:
            return list(found_ends.values())
        raise self._unknown(text, wanted)

    def _exact(self, wanted: Path) -> Found | None:
        if why := refusal(_with_places(wanted)):
            return Found(".".join(map(str, wanted)), None, refused=why)
        if (key := self.look_up(wanted)) is not None:
            return Found(key.path, key)
        own = {name: key for name in self.families if (key := self.look_up(wanted, name)) is not None}
        if not own:
            return None
        key = next(iter(own.values()))
        return Found(key.path, key, models=tuple(own))

    def look_up(self, wanted: Path, family: str | None = None) -> Key | None:
        """The key of these names; one of a mapping may stand between them or at their end. family: also its own."""
        places = {**self.shared, **{path: by[family] for path, by in self.own.items() if family in by}}
        if wanted in places:
            return self.where_it_acts(places[wanted])
        for at in range(1, len(wanted)):
            key = places.get((*wanted[:at], *wanted[at + 1 :]))
            if key is not None and f"{'.'.join(map(str, wanted[:at]))}.*." in key.path.replace("[]", ""):
                return key
        above = places.get(wanted[:-1])
        return above if above is not None and "dict[" in str(above.field.annotation) and not above.inner else None

    @property
    def families(self) -> dict[str, None]:
        """The models that have keys of their own."""
        return {name: None for by in self.own.values() for name in by}

    def where_it_acts(self, key: Key) -> Key:
        """The key of the source or set that a key of ``data.defaults``, or of a set, stands for."""
        path = names(key.path)
        if len(path) < 3 or path[1] not in ("defaults", "sets") or path[2] == "sources":
            return key
        homes = (("data", "sets", "sources", *path[2:]), ("data", "sets", *path[2:]))
        return next((self.shared[home] for home in homes if home in self.shared), key)

    def _unknown(self, text: str, wanted: Path) -> UsageError:
        known = {".".join(map(str, path)) for path in (*self.shared, *self.own)}
        joined = ".".join(map(str, wanted)).lower()
        near = difflib.get_close_matches(joined, known, n=3, cutoff=0.6)
        last = str(wanted[-1]).lower() if wanted else ""
        by_name = {str(path[-1]): ".".join(map(str, path)) for path in (*self.shared, *self.own)}
        near += [by_name[name] for name in difflib.get_close_matches(last, by_name, n=3, cutoff=0.75)]
        shown = ", ".join(dict.fromkeys(near))
        fix = f"did you mean {shown}?" if shown else "tuner explain SECTION lists its keys, such as tuner explain train"
        return UsageError(f"there is no key {text!r}", fix=fix)


@cache
def core_keys() -> tuple[Key, ...]:
    """Every key that all models share."""
    return tuple(schema_keys(RunConfig))


def model_keys(catalog: Catalog, family: str) -> Iterator[Key]:
    """Every key of the ``model`` section of one plugin."""
    schema = run_schema(model_schema(catalog, family))
    return (key for key in schema_keys(schema) if key.path.startswith("model."))


def names(text: str) -> Path:
    """``data.sets[0].sources[].path`` as ``(data, sets, sources, path)``."""
    return tuple(part for part in _NAME.findall(text) if not part.isdigit())


_LISTS = {("data", "sets"), ("data", "sets", "sources")}


def _with_places(wanted: Path) -> Path:
    """A path as in a document, with an index where a list is gone through."""
    path: list[str | int] = []
    for depth, part in enumerate(wanted, 1):
        path.append(part)
        if wanted[:depth] in _LISTS and depth < len(wanted):
            path.append(0)
    return tuple(path)
