"""``tuner plugins check``: import plugins one by one and say what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from packaging.utils import canonicalize_name

from tuner.cli.console import error, out, out_json
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.registry import Catalog, Entry


def check(names: Sequence[str], *, as_json: bool) -> int:
    """0 when all named plugins (none named: all that are installed) are in order, else 1."""
    from tuner.core.lifecycle.check import plugin_problems
    from tuner.core.registry import Catalog

    catalog = Catalog()
    entries = _chosen(catalog, names)
    wanted = {entry.dist for entry in entries}
    found = {entry: plugin_problems(catalog, entry) for entry in entries}
    metadata = [each for each in catalog.problems if each.stage == "metadata" and (not names or each.dist in wanted)]
    broken = any(found.values()) or bool(metadata)
    if as_json:
        plugins = [
            {"name": entry.name, "kind": entry.kind, "dist": entry.dist, "version": entry.version, "problems": problems}
            for entry, problems in found.items()
        ]
        out_json({"ok": not broken, "plugins": plugins, "problems": [str(each) for each in metadata]})
        return int(broken)
    for entry, problems in found.items():
        title = f"{entry.kind} {entry.name} ({entry.dist} {entry.version})"
        out(f"{title}: {'not usable' if problems else 'in order'}")
        for problem in problems:
            error(problem)
    for each in metadata:
        error(f"{each}\n  fix: {each.hint}")
    return int(broken)


def _chosen(catalog: Catalog, names: Sequence[str]) -> list[Entry]:
    """Plugins by their own name or that of their package. UsageError for a name that is neither."""
    from tuner.core.lifecycle.installed import plugin_packages
    from tuner.core.registry.catalog import EXTENSIONS, MODELS

    entries = [*catalog.entries(MODELS), *catalog.entries(EXTENSIONS)]
    chosen: dict[Entry, None] = {}
    for name in names:
        package = canonicalize_name(name)
        matching = [each for each in entries if each.name == name or canonicalize_name(each.dist) == package]
        problem = next((each for each in catalog.problems if name in (each.name, each.dist)), None)
        if not matching and problem is not None:
            raise problem.as_error()
        if not matching:
            raise _unknown(name, plugin_packages(), [each.name for each in entries])
        chosen |= dict.fromkeys(matching)
    return list(chosen) if names else entries


def _unknown(name: str, packages: dict[str, str], plugins: Sequence[str]) -> UsageError:
    from difflib import get_close_matches
    from importlib import metadata

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        guess = get_close_matches(name, plugins, n=1)
        fix = f"did you mean {guess[0]!r}?" if guess else f"tuner plugins install {name}"
        return UsageError(f"there is no installed plugin {name!r}", fix=fix)
    if canonicalize_name(name) in packages:
        return UsageError(f"the plugins of {name} {version} cannot be read", fix=f"tuner plugins uninstall {name}")
    return UsageError(
        f"{name} {version} is installed, but brings no plugin",
        why="its metadata has no entry point in tuner.models or tuner.extensions",
        fix="tell its author: see the guide to writing a plugin",
    )
