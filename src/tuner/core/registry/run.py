"""Opening a run: from a configuration document to the model's facade, before any weight is read."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest, sha256
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from tuner.core.config import (
    ModelConfigBase,
    RawConfig,
    RunConfig,
    build_config,
    facts_problems,
    load_config,
    resolve_defaults,
)
from tuner.core.config.network import kinds_of
from tuner.core.errors import NotHereError, Problems, UsageError
from tuner.core.files import WeightHeader, weight_header
from tuner.core.places import here_only
from tuner.core.registry.catalog import EXTENSIONS, MODELS, Catalog, Entry
from tuner.core.registry.extensions import Extensions
from tuner.core.registry.facade import ModelFacade
from tuner.core.registry.ownership import new_manager
from tuner.core.types import KeyMaps, ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A configuration with the facts of its model: everything that is known without importing torch."""

    config: RunConfig
    facts: ModelFacts
    files: Mapping[str, Sequence[Path]]
    header: WeightHeader
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """An open run. ``config`` is resolved; ``manifest`` names the version of everything that takes part."""

    model: ModelFacade
    config: RunConfig
    facts: ModelFacts
    files: Mapping[str, Sequence[Path]]
    extensions: Extensions
    manifest: dict[str, Any]


def model_schema(catalog: Catalog, family: str) -> type[ModelConfigBase]:
    """The pydantic model of a plugin's ``model`` section."""
    entry = catalog.entry(MODELS, family)
    reference = catalog.model(family).config
    schema = catalog.load(entry, "descriptor", reference)
    if not (isinstance(schema, type) and issubclass(schema, ModelConfigBase)):
        raise UsageError(f"{reference} of the plugin {family!r} is not a ModelConfigBase")
    return schema


def typed_config(raw: Mapping[str, Any], catalog: Catalog, *, base_dir: Path | None = None) -> RunConfig:
    """Check a document against the schema of the model it names."""
    document = raw if isinstance(raw, RawConfig) else load_config(raw, env={}, base_dir=base_dir)
    return build_config(document, model_schema(catalog, family_of(document, catalog)))


def family_of(raw: RawConfig, catalog: Catalog) -> str:
    """The model that a document names."""
    section = raw.get("model")
    family = section.get("family") if isinstance(section, dict) else None
    if not isinstance(family, str):
        known = ", ".join(entry.name for entry in catalog.entries(MODELS))
        raise UsageError(
            "which model is this for?",
            where=raw.where(("model", "family")),
            why=f"installed: {known}",
            fix='add --model NAME, or "family": "NAME" to the model section',
        )
    return family


def open_facts(config: RunConfig, catalog: Catalog, raw: RawConfig | None = None) -> Opened:
    """Find the files, read the header of the denoiser, and check and complete the configuration with the facts."""
    family = config.model.family
    entry, descriptor = catalog.entry(MODELS, family), catalog.model(family)
    files = catalog.call(entry, "files", catalog.load(entry, "descriptor", descriptor.files), config)
    header = weight_header(files["denoiser"][0])
    flavour = catalog.call(entry, "detect", catalog.load(entry, "descriptor", descriptor.detect), header)
    if flavour is None:
        raise UsageError(
            f"these weights are not of the model {family!r}", where=str(header.path), fix=_other(catalog, header)
        )
    facts = catalog.call(entry, "facts", catalog.load(entry, "descriptor", descriptor.facts), config, header)
    resolved = _resolved(config, facts, catalog, entry, raw)
    return Opened(config=resolved, facts=facts, files=files, header=header, entry=entry)


def open_public(config: RunConfig, catalog: Catalog, raw: RawConfig | None = None) -> tuple[RunConfig, ModelFacts]:
    """The facts of the published model that ``model.flavour`` names, without any file, and the configuration with them.

    UsageError when the plugin knows no published models.
    """
    entry, descriptor = catalog.entry(MODELS, config.model.family), catalog.model(config.model.family)
    if descriptor.public is None:
        raise UsageError(
            f"the sizes of {entry.name!r} are known from its weights alone",
            where="model.path",
            why="its plugin lists no published models",
            fix="name weights that are on this machine",
        )
    facts = catalog.call(entry, "public", catalog.load(entry, "descriptor", descriptor.public), config)
    return _resolved(config, facts, catalog, entry, raw), facts


def open_known(
    config: RunConfig, catalog: Catalog, raw: RawConfig | None = None
) -> tuple[RunConfig, ModelFacts, NotHereError | None]:
    """``open_facts`` where the model's files are on this machine, else ``open_public`` and what is not here.

    Nothing is fetched. NotHereError when neither tells the facts; other UsageErrors are problems of the configuration.
    """
    try:
        with here_only():
            opened = open_facts(config, catalog, raw)
        return opened.config, opened.facts, None
    except NotHereError as absent:
        try:
            return (*open_public(config, catalog, raw), absent)
        except UsageError as unknown:
            raise NotHereError(unknown.what, where=absent.where, why=absent.what, fix=unknown.fix) from absent


def _resolved(config: RunConfig, facts: ModelFacts, catalog: Catalog, entry: Entry, raw: RawConfig | None) -> RunConfig:
    """The configuration checked against the facts and completed by them."""
    maps = catalog.load(entry, "descriptor", facts.key_maps)
    formats = _formats(maps, kinds_of(config.network))
    problems = Problems()
    problems.extend(_format_problems(maps, formats, config))
    problems.extend(facts_problems(config, facts, raw, formats=[each.name for each in maps.formats]))
    problems.raise_if_any()
    return resolve_defaults(config, facts, formats=formats)


def _formats(maps: KeyMaps, kinds: Collection[str]) -> tuple[str, ...]:
    """Names of the formats that hold these kinds of adapters, the model's default first if it does."""
    able = [each.name for each in maps.formats if set(kinds) <= set(each.kinds)]
    return tuple(sorted(able, key=lambda name: name != maps.default))


def _format_problems(maps: KeyMaps, able: tuple[str, ...], config: RunConfig) -> Iterator[UsageError]:
    kinds = " with ".join(kinds_of(config.network))
    wanted = config.checkpoint.format
    if not able:
        yield UsageError(f"no format of this model holds {kinds}", where="network.type", fix="choose another kind")
    elif wanted is not None and wanted not in able and maps.format(wanted) is not None:
        yield UsageError(
            f"the format {wanted!r} does not hold {kinds}",
            where="checkpoint.format",
            why="the programs that read it do not know this kind of adapter",
            fix=f"use one of: {', '.join(able)}",
        )


def _other(catalog: Catalog, header: WeightHeader) -> str:
    """The installed model that knows these weights, as advice; plugins that cannot be asked are passed over."""
    for entry in catalog.entries(MODELS):
        try:
            detect = catalog.load(entry, "descriptor", catalog.model(entry.name).detect)
            if catalog.call(entry, "detect", detect, header) is not None:
                return f"they are of {entry.name!r}: use --model {entry.name}"
        except UsageError:
            continue
    return "name the weights of the model in model.path"


def open_run(
    raw: Mapping[str, Any] | RunConfig, *, base_dir: Path | None = None, catalog: Catalog | None = None
) -> Run:
    """Open a run: configuration, facts, hooks, ownership. UsageError for anything that is wrong; no weight is read."""
    catalog = catalog or Catalog()
    document = None
    if isinstance(raw, RunConfig):
        config = raw
    else:
        document = raw if isinstance(raw, RawConfig) else load_config(raw, env={}, base_dir=base_dir)
        config = typed_config(document, catalog)
    # Extensions are looked up first: a misspelt name should not wait for a download.
    extensions = {name: catalog.entry(EXTENSIONS, name) for name in config.extensions}
    hooks = {name: catalog.extension(name).hooks for name in extensions}
    opened = open_facts(config, catalog, document)
    entry = opened.entry
    modules: dict[str, ModuleType] = {
        _title(extension): catalog.load(extension, "hooks", hooks[name]) for name, extension in extensions.items()
    }
    title = _title(entry)
    module = catalog.load(entry, "hooks", catalog.model(entry.name).hooks)
    manager = new_manager((title, module), modules)
    return Run(
        model=ModelFacade(title, opened.config, opened.facts, opened.files, manager.hook),
        config=opened.config,
        facts=opened.facts,
        files=opened.files,
        extensions=Extensions(config.extensions, manager.hook),
        manifest=_manifest([entry, *extensions.values()], catalog) | _merged(config),
    )


def _merged(config: RunConfig) -> dict[str, Any]:
    """The adapters that become part of the base, by name and bytes; nothing where there is none."""
    found = []
    for number, each in enumerate(config.model.merge):
        path = Path(each.path)
        try:
            with path.open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
        except OSError as error:
            where = f"{path}, model.merge[{number}]"
            raise UsageError("cannot read the adapter", where=where, why=error.strerror) from error
        found.append({"file": path.name, "strength": each.strength, "sha256": digest})
    return {"merged": found} if found else {}


def _title(entry: Entry) -> str:
    """How messages name a plugin; unique in a run, as a model and an extension may share name and version."""
    return f"{'plugin' if entry.group == MODELS else 'extension'} '{entry.name}' {entry.version}"


def _manifest(entries: list[Entry], catalog: Catalog) -> dict[str, Any]:
    plugins = []
    for entry in entries:
        descriptor = catalog.model(entry.name) if entry.group == MODELS else catalog.extension(entry.name)
        record = metadata.distribution(entry.dist).read_text("RECORD") if catalog.path is None else None
        plugins.append(
            {
                "kind": entry.kind,
                "name": entry.name,
                "dist": entry.dist,
                "version": entry.version,
                "api": list(descriptor.api),
                "record": sha256(record.encode()).hexdigest() if record else None,
            }
        )
    packages = {}
    for name in ("tuner", "torch", "safetensors", "transformers", "numpy", "pillow"):
        packages[name] = metadata.version(name)
    return {"python": platform.python_version(), "plugins": plugins, "packages": packages}
