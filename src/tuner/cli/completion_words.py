"""What a shell can complete: read from the parsers, the schema and the installed plugins. Nothing imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.cli.main import COMMANDS, command_parser
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.registry import Catalog

FILES, FOLDERS = "files", "folders"
LISTS = ("models", "presets", "plugins", "keys", "devices")
SETS = "sets"
"""Kinds of words: files and folders, lists by name, and ``KEY=VALUE``. Any other word stands for itself."""

_BY_DEST = {"sets": SETS, "model": "models", "preset": "presets"}
_BY_METAVAR = {
    "CONFIG": FILES, "FILE": FILES, "SOURCE": FILES, "TARGET": FILES,
    "DIR": FOLDERS, "FOLDER": FOLDERS, "RUN": FOLDERS, "CHECKPOINT": FOLDERS,
}  # fmt: skip
_SPECIAL: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("explain", "what"): ("keys", FILES),
    ("cache", "what"): ("info", "verify", "prune", FILES),
    ("plan", "device"): ("devices",),
    ("plugins show", "name"): ("plugins",),
    ("plugins check", "name"): ("plugins",),
    ("plugins uninstall", "name"): ("plugins",),
}


@dataclass(frozen=True, slots=True)
class Flag:
    """An option. words: kinds of its value; None for one that takes none, empty for free text."""

    name: str
    help: str
    words: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Place:
    """A command, or one of its actions (``plugins show``). words: kinds of its arguments."""

    name: str
    help: str
    flags: tuple[Flag, ...]
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Words:
    """Everything. actions: by command. lists: the words of each kind in ``LISTS``; values: listed values by key."""

    commands: Mapping[str, str]
    actions: Mapping[str, Mapping[str, str]]
    places: tuple[Place, ...]
    lists: Mapping[str, tuple[str, ...]]
    values: Mapping[str, tuple[str, ...]]


def collect() -> Words:
    """Read parsers, schema and plugins; a plugin that cannot be read is left out."""
    actions: dict[str, Mapping[str, str]] = {}
    places: list[Place] = []
    for name, summary in COMMANDS.items():
        parser = command_parser(name)
        inner = next((each for each in parser._actions if isinstance(each, argparse._SubParsersAction)), None)
        if inner is None:
            places.append(_place(name, summary, parser))
            continue
        helps = {each.dest: each.help or "" for each in inner._choices_actions}
        actions[name] = helps
        places += [_place(f"{name} {action}", helps.get(action, ""), each) for action, each in inner.choices.items()]
    lists, values = _lists()
    return Words(COMMANDS, actions, tuple(places), lists, values)


def _place(name: str, summary: str, parser: argparse.ArgumentParser) -> Place:
    flags, words = [], list[str]()
    for action in parser._actions:
        kinds = _kinds(name, action)
        if action.option_strings:
            help_text = (action.help or "").partition(";")[0]
            flags.append(Flag(action.option_strings[-1], help_text, None if action.nargs == 0 else kinds))
        else:
            words += kinds
    return Place(name, summary, tuple(flags), tuple(dict.fromkeys(words)))


def _kinds(place: str, action: argparse.Action) -> tuple[str, ...]:
    if action.choices is not None:
        return tuple(str(each) for each in action.choices)
    if (place, action.dest) in _SPECIAL:
        return _SPECIAL[place, action.dest]
    if action.dest in _BY_DEST and action.option_strings:
        return (_BY_DEST[action.dest],)
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    return (_BY_METAVAR[metavar],) if metavar in _BY_METAVAR else ()


def _lists() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    from tuner.core.plan.devices import DEVICES
    from tuner.core.registry import EXTENSIONS, MODELS, Catalog, preset_names

    catalog = Catalog()
    models = [entry.name for entry in catalog.entries(MODELS)]
    presets: list[str] = []
    for model in models:
        try:
            presets += [f"{model}/{name}" for name in preset_names(catalog, model)]
        except UsageError:
            continue
    keys: dict[str, tuple[str, ...]] = {}
    for key, listed in _keys(catalog, models):
        keys[key] = tuple(dict.fromkeys((*keys.get(key, ()), *listed)))
    lists = {
        "models": tuple(models),
        "presets": tuple(presets),
        "plugins": (*models, *(entry.name for entry in catalog.entries(EXTENSIONS))),
        "keys": tuple(sorted(keys)),
        "devices": (*DEVICES, "cpu") if "cpu" not in DEVICES else tuple(DEVICES),
    }
    return lists, {key: values for key, values in sorted(keys.items()) if values}


def _keys(catalog: Catalog, models: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every key that holds a value, lists with the index 0, and the values it may have where they are listed."""
    from tuner.core.config.describe import choices
    from tuner.core.explain.find import core_keys, model_keys

    found = list(core_keys())
    for model in models:
        try:
            found += model_keys(catalog, model)
        except UsageError:
            continue
    for key in found:
        section = any(each.__name__ != "EveryFields" for each in key.inner)
        if not section and ".*" not in key.path:
            listed = [each for each in choices(key.section, key.name) if isinstance(each, str | bool)]
            values = tuple(str(each).lower() if isinstance(each, bool) else each for each in listed)
            yield key.path.replace("[]", ".0"), values
