"""What a key means, or where every value of a configuration comes from.

WHAT is a key such as network.rank (its last part is enough), a section such as train, or a configuration file; a file
and keys explain those values of the file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.cli.console import error, heading, out, out_json, wrapped
from tuner.cli.settings import add_setting_options, load
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.explain.find import Keys
    from tuner.core.explain.keys import KeyInfo
    from tuner.core.explain.values import Explained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", metavar="WHAT", help="keys, sections, or one configuration file")
    add_setting_options(parser)
    parser.add_argument("--changed", action="store_true", help="of a configuration: only what differs from the default")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(command="explain")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.explain.find import Keys
    from tuner.core.registry import Catalog

    catalog = Catalog()
    files = [each for each in arguments.what if Path(each).suffix in (".json", ".jsonc") or Path(each).is_file()]
    words = [each for each in arguments.what if each not in files]
    if len(files) > 1:
        raise UsageError("one configuration at a time", fix=f"tuner explain {files[0]}")
    arguments.config = files[0] if files else None
    keys = Keys(catalog)
    if files or arguments.sets or arguments.preset:
        return _values(arguments, keys, words)
    if not words:
        raise UsageError("explain what?", fix="tuner explain KEY, such as network.rank, or tuner explain config.json")
    return _keys(words, keys, as_json=arguments.json)


def _keys(words: list[str], keys: Keys, *, as_json: bool) -> int:
    from tuner.core.explain.keys import explain_key

    found = [explain_key(each, keys) for word in words for each in keys.find(word)]
    if as_json:
        out_json([each.as_dict() for each in found])
        return 0
    for number, info in enumerate(found):
        if number:
            out("")
        _show(info)
    return 0


def _show(info: KeyInfo) -> None:
    from tuner.core.explain.costs import WHERE

    heading(info.path)
    if info.refused:
        words = "is planned and not built yet; it is for" if info.refused == "planned" else "does not apply here"
        wrapped(f"{words}: {info.meaning}")
        return
    wrapped(info.meaning)
    if info.only:
        wrapped(f"only for: {', '.join(info.only)}")
    if not info.inner:
        wrapped(f"type: {info.type}")
        for value, why in info.planned_values.items():
            wrapped(f'"{value}" is planned: {why}' if why else f'"{value}" is never written: it is not safe')
        wrapped(f"default: {info.default}")
    for note in info.models:
        told = [f"default {note.default}" if note.default else "", note.type, note.meaning]
        wrapped(f"{note.model}: {'; '.join(each for each in told if each)}" if any(told) else "")
    presets = [(value, preset) for note in info.models for preset, value in note.presets.items()]
    for given in dict.fromkeys(value for value, _ in presets):
        wrapped(f"presets with {given}: {', '.join(preset for value, preset in presets if value == given)}")
    if info.inherited:
        wrapped(f"for several at once: {', '.join(info.inherited)}")
    if info.commands:
        may = "may change" if info.may_change_on_resume else "has to stay"
        wrapped(f"acts on: {', '.join(f'tuner {name}' for name in info.commands)}; {may} when a run is resumed")
    for conflict in info.conflicts:
        keys = "" if conflict.keys == (info.path,) else f"{', '.join(conflict.keys)}: "
        given = f"{' or '.join(conflict.values)}: " if conflict.values else ""
        fix = f" ({conflict.fix})" if conflict.fix else ""
        wrapped(f"conflict: {given}{keys}{conflict.problem}{fix}")
    if info.needed_by:
        wrapped(f"needed by: {', '.join(info.needed_by)}")
    for cost in info.measured:
        wrapped(f"measured cost: {cost}")
    if info.measured:
        wrapped(f"measured on {WHERE}")
    for key, kind, default, text in info.inner:
        out(f"\n  {key}: {kind}, {default if default == 'required' else f'default {default}'}")
        wrapped(text, 4)


def _values(arguments: argparse.Namespace, keys: Keys, words: list[str]) -> int:
    from tuner.core.explain.costs import WHERE
    from tuner.core.explain.values import explain_config

    explained = explain_config(load(arguments, keys.catalog), keys, _only(words, keys))
    values = [each for each in explained.values if not arguments.changed or each.changed]
    if arguments.json:
        out_json(explained.as_dict() | {"values": [each.as_dict() for each in values]})
        return 2 if explained.problems else 0
    section = None
    for value in values:
        if section != (section := value.key.split(".")[0].split("[")[0]):
            heading(section)
        default = f"; default {value.default}" if value.changed and value.default else ""
        out(f"  {value.key} = {value.text}   [{value.origin}{default}]")
        wrapped(value.meaning, 6)
        for cost in value.measured:
            wrapped(f"measured cost: {cost}", 6)
        for problem in value.problems:
            error(str(problem))
    if any(value.measured for value in values):
        out(f"costs were measured on {WHERE}")
    _tell(explained)
    return 2 if explained.problems else 0


def _only(words: list[str], keys: Keys) -> set[tuple[str | int, ...]] | None:
    from tuner.core.explain.find import names

    return {names(found.path) for word in words for found in keys.find(word)} if words else None


def _tell(explained: Explained) -> None:
    for problem in explained.problems:
        if not any(problem in value.problems for value in explained.values):
            error(str(problem))
    for note in explained.notes:
        out(note)
