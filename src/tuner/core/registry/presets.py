"""Presets of a model: JSON files in its package that hold differences from the defaults."""

from __future__ import annotations

from importlib import resources

from tuner.core.config import RawConfig
from tuner.core.config.document import walk
from tuner.core.config.jsonc import parse
from tuner.core.errors import UsageError
from tuner.core.registry.catalog import MODELS, Catalog


def preset_names(catalog: Catalog, family: str) -> list[str]:
    """Names of the presets that a model brings."""
    package = catalog.model(family).presets
    if package is None:
        return []
    folder = resources.files(package)
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def read_preset(catalog: Catalog, name: str) -> RawConfig:
    """The settings of ``model/preset``, with ``model.family`` set."""
    family, slash, preset = name.partition("/")
    if not slash:
        raise UsageError(f"there is no preset {name!r}", why="a preset is named MODEL/PRESET", fix="tuner plugins list")
    known = preset_names(catalog, family)
    if preset not in known:
        fix = f"presets of {family}: {', '.join(known)}" if known else f"{family} has no presets"
        raise UsageError(f"there is no preset {name!r}", fix=fix)
    package = catalog.model(family).presets
    assert package is not None
    text = resources.files(package).joinpath(f"{preset}.json").read_text(encoding="utf-8")
    settings = parse(text, f"preset {name}").value
    if not isinstance(settings, dict):
        raise UsageError(
            f"the preset {name!r} is not a JSON object", fix=f"tell the author of {catalog.entry(MODELS, family).dist}"
        )
    whole = settings | {"model": {"family": family} | settings.get("model", {})}
    return RawConfig(whole, {path: f"preset {name}" for path, _ in walk(whole)})
