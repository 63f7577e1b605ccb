"""Installed packages that bring plugins, known from their metadata alone."""

from __future__ import annotations

import importlib
from importlib import metadata

from packaging.utils import canonicalize_name

from tuner.core.errors import UsageError
from tuner.core.registry.catalog import EXTENSIONS, HOME, MODELS, Catalog


def plugin_packages() -> dict[str, str]:
    """Normalised package name to version of every third-party package with an entry point of ours, usable or not."""
    # A package that was installed a moment ago is not in the import system's memory yet.
    importlib.invalidate_caches()
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name != HOME and _has_plugin(distribution):
            found.setdefault(canonicalize_name(name), distribution.version)
    return dict(sorted(found.items()))


def package_of(name: str) -> str:
    """The package that brings the plugin ``name``, or that is called so. UsageError: not installed, or no plugin."""
    packages = plugin_packages()
    catalog = Catalog()
    entries = [entry for group in (MODELS, EXTENSIONS) for entry in catalog.entries(group)]
    owners = {canonicalize_name(entry.dist): entry for entry in entries if entry.name == name}
    # A plugin whose metadata has a problem is not among the entries, and is what people want to remove.
    broken = {canonicalize_name(each.dist) for each in catalog.problems if each.name == name and each.dist != "?"}
    if (package := canonicalize_name(name)) in packages:
        return package
    candidates = sorted({*owners, *broken} & set(packages))
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UsageError(f"{name!r} comes from several packages", fix=f"name one of them: {', '.join(candidates)}")
    if HOME in owners:
        raise UsageError(f"{name!r} is built in", why=f"it is part of {HOME} itself")
    listed = ", ".join(packages) or "none"
    raise UsageError(f"there is no installed plugin {name!r}", why=f"packages with plugins: {listed}")


def _has_plugin(distribution: metadata.Distribution) -> bool:
    text = distribution.read_text("entry_points.txt") or ""
    return any(f"[{group}]" in text for group in (MODELS, EXTENSIONS))
