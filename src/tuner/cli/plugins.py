"""List, show, check, install and remove models and extensions; start a new one."""

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
    _json(listed)
    listed.add_argument(
        "--requirements", action="store_true", help="one PACKAGE==VERSION per line, for a requirements file"
    )
    show = actions.add_parser("show", help="what one plugin offers; imports its descriptor")
    show.add_argument("name", metavar="NAME")
    _json(show)
    check = actions.add_parser("check", help="import plugins and check what they declare; without NAME all of them")
    check.add_argument("name", nargs="*", metavar="NAME", help="plugins, or packages that bring some")
    _json(check)
    install = actions.add_parser("install", help="install plugins with the tool that made this environment")
    install.add_argument("package", nargs="+", metavar="PACKAGE", help="a name such as tuner-x>=1.2, or a wheel")
    install.add_argument("--upgrade", action="store_true", help="take the newest version")
    install.add_argument("--allow-sdist", action="store_true", help="also build from source, which runs its build code")
    _dry_run(install)
    uninstall = actions.add_parser("uninstall", help="remove plugins, broken ones too; imports none")
    uninstall.add_argument("name", nargs="+", metavar="NAME", help="plugins, or packages that bring some")
    _dry_run(uninstall)
    sync = actions.add_parser("sync", help="install what was installed before and is missing now")
    sync.add_argument("--allow-sdist", action="store_true", help="also build from source, which runs its build code")
    _dry_run(sync)
    new = actions.add_parser("new", help="write the start of a plugin into a new folder")
    new.add_argument("name", metavar="NAME", help="what users will type, such as my-model")
    new.add_argument("--template", choices=("model", "extension"), default="model", help="what kind of plugin")
    new.add_argument("--path", metavar="FOLDER", help="where the new folder goes; here when left out")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")


def run(arguments: argparse.Namespace) -> int:
    match arguments.action:
        case "check":
            from tuner.cli.plugin_check import check

            return check(arguments.name, as_json=arguments.json)
        case "install":
            from tuner.cli.plugin_install import install

            return install(
                arguments.package,
                upgrade=arguments.upgrade,
                allow_sdist=arguments.allow_sdist,
                dry_run=arguments.dry_run,
            )
        case "uninstall":
            from tuner.cli.plugin_install import uninstall

            return uninstall(arguments.name, dry_run=arguments.dry_run)
        case "sync":
            from tuner.cli.plugin_install import sync

            return sync(allow_sdist=arguments.allow_sdist, dry_run=arguments.dry_run)
        case "new":
            from tuner.cli.plugin_new import new

            return new(arguments.name, arguments.template, arguments.path)
        case "show":
            from tuner.core.registry.catalog import Catalog

            return _show(Catalog(), arguments.name, as_json=arguments.json)
        case _:
            return _requirements() if arguments.requirements else _list(as_json=arguments.json)


def _requirements() -> int:
    from tuner.core.lifecycle.installed import plugin_packages

    for package, version in plugin_packages().items():
        out(f"{package}=={version}")
    return 0


def _list(*, as_json: bool) -> int:
    from tuner.core.registry.catalog import EXTENSIONS, MODELS, Catalog

    catalog = Catalog()
    entries = [*catalog.entries(MODELS), *catalog.entries(EXTENSIONS)]
    problems = catalog.warnings()
    broken = {(problem.dist, problem.name) for problem in problems}
    if as_json:
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
