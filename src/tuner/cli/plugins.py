"""List installed models and extensions, or show one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tuner.cli.console import out, out_json, table, warn
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.registry.catalog import Catalog, Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listed = actions.add_parser("list", help="names, versions and problems; imports nothing")
    listed.add_argument("--json", action="store_true", help="print the result as JSON")
    show = actions.add_parser("show", help="what one plugin offers; imports its descriptor")
    show.add_argument("name", metavar="NAME")
    show.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.registry.catalog import EXTENSIONS, MODELS, Catalog

    catalog = Catalog()
    if arguments.action == "show":
        return _show(catalog, arguments.name, as_json=arguments.json)
    entries = [*catalog.entries(MODELS), *catalog.entries(EXTENSIONS)]
    problems = catalog.warnings()
    broken = {(problem.dist, problem.name) for problem in problems}
    if arguments.json:
        shown = [_metadata(entry) | {"usable": (entry.dist, entry.name) not in broken} for entry in entries]
        unusable = [
            {"name": p.name, "dist": p.dist, "version": p.version, "error": p.error, "hint": p.hint} for p in problems
        ]
        out_json({"plugins": shown, "problems": unusable})
        return 0
    rows = [
        (entry.name, entry.kind, "built in" if entry.builtin else f"{entry.dist} {entry.version}", entry.summary)
        if (entry.dist, entry.name) not in broken
        else (entry.name, entry.kind, f"{entry.dist} {entry.version}", "not usable")
        for entry in entries
    ]
    table(("name", "kind", "from", "summary"), rows)
    for problem in problems:
        warn(f"{problem}\n  fix: {problem.hint}")
    return 0


def _metadata(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "dist": entry.dist,
        "version": entry.version,
        "summary": entry.summary,
        "descriptor": entry.value,
    }


def _show(catalog: Catalog, name: str, *, as_json: bool) -> int:
    from tuner.core.registry.catalog import EXTENSIONS, MODELS

    group = EXTENSIONS if any(entry.name == name for entry in catalog.entries(EXTENSIONS)) else MODELS
    entry = catalog.entry(group, name)
    shown = _metadata(entry)
    if group == MODELS:
        from tuner.core.registry.presets import preset_names

        model = catalog.model(name)
        maps = catalog.load(entry, "descriptor", model.key_maps) if model.key_maps else None
        shown["api"] = ".".join(map(str, model.api))
        shown["config"] = model.config
        shown["presets"] = [f"{name}/{preset}" for preset in preset_names(catalog, name)]
        shown["formats"] = [each.name for each in maps.formats] if maps else []
    else:
        shown["api"] = ".".join(map(str, catalog.extension(name).api))
    hooks = (catalog.model(name) if group == MODELS else catalog.extension(name)).hooks
    try:
        catalog.load(entry, "hooks", hooks)
        shown["hooks"] = hooks
    except UsageError:
        shown["hooks"] = f"cannot be imported: {catalog.problems[-1].error}"
    if as_json:
        out_json(shown)
    else:
        for key, value in shown.items():
            out(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    return 0
