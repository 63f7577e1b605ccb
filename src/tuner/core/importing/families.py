"""Which model a source is for, and the tables that its plugin adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tuner.core.config.foreign import ForeignFamily
from tuner.core.config.model import ModelConfigBase
from tuner.core.errors import UsageError
from tuner.core.registry import MODELS, Catalog, model_schema


@dataclass(frozen=True, slots=True)
class Choice:
    """A model plugin, and what the other program calls the model."""

    model: str
    family: ForeignFamily


def choices(catalog: Catalog, tool: str) -> list[Choice]:
    """Everything that the installed plugins say about a program."""
    found = []
    for entry in catalog.entries(MODELS):
        reference = catalog.model(entry.name).importers
        if reference is not None:
            tables: Mapping[str, tuple[ForeignFamily, ...]] = catalog.load(entry, "descriptor", reference)
            found += [Choice(entry.name, family) for family in tables.get(tool, ())]
    return found


def choose(known: list[Choice], fits: Callable[[ForeignFamily], bool], model: str | None) -> Choice | None:
    """The first choice that fits, and of the given model when one is given."""
    return next((each for each in known if fits(each.family) and model in (None, each.model)), None)


def of_model(known: list[Choice], model: str, tool: str) -> Choice:
    """The first choice of a model that the command line names."""
    found = choose(known, lambda family: True, model)
    if found is None:
        listed = ", ".join(sorted({each.model for each in known}))
        raise UsageError(f"the model {model!r} says nothing about {tool}", why=f"models that do: {listed}")
    return found


def schema_of(catalog: Catalog, choice: Choice | None) -> type[ModelConfigBase]:
    """The ``model`` section of the chosen model; what all models share where none is chosen."""
    return ModelConfigBase if choice is None else model_schema(catalog, choice.model)
