"""Everything that is known about one key, whatever the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tuner.core.config import build_config
from tuner.core.config.describe import (
    INHERITED,
    Key,
    as_json,
    choices,
    default_words,
    entry_suffix,
    meaning,
    schema_keys,
    type_words,
)
from tuner.core.config.document import merged, value_at
from tuner.core.config.jsonc import Path
from tuner.core.config.planned import refused_values
from tuner.core.config.resuming import free_on_resume
from tuner.core.errors import UsageError
from tuner.core.explain.conflicts import Conflict, conflicts, needed_by
from tuner.core.explain.costs import costs_of_key
from tuner.core.explain.find import Found, Keys, model_keys, names
from tuner.core.registry import MODELS, Catalog, model_schema, open_public, preset_names, read_preset

READERS: Mapping[str, tuple[str, ...]] = {
    "model": ("train", "plan", "cache", "verify"),
    "text_encoder": ("train", "plan", "cache", "verify"),
    "latents": ("train", "plan", "cache", "verify"),
    "data": ("train", "plan", "cache", "verify", "data inspect"),
    "cache": ("train", "plan", "cache", "verify", "data inspect"),
    "noise": ("train", "verify"),
    "loss": ("train", "verify"),
    "guidance": ("train", "verify"),
    "network": ("train", "plan", "verify"),
    "optimizer": ("train", "plan"),
    "schedule": ("train",),
    "train": ("train", "plan", "verify"),
    "precision": ("train", "plan", "cache", "verify"),
    "quantize": ("train", "plan", "cache", "verify"),
    "memory": ("train", "plan", "verify"),
    "attention": ("train", "plan", "verify"),
    "compile": ("train", "plan", "verify"),
    "ema": ("train", "plan"),
    "checkpoint": ("train", "plan"),
    "sample": ("train", "plan"),
    "validate": ("train",),
    "log": ("train", "cache", "verify"),
    "extensions": ("train", "cache", "verify"),
}
"""Commands on which the keys of a section have an effect; all of them check every key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNote:
    """What is different for one model. default, type, meaning: empty where nothing is; presets: name to value."""

    model: str
    default: str = ""
    type: str = ""
    meaning: str = ""
    presets: Mapping[str, str]

    @property
    def says_something(self) -> bool:
        return bool(self.default or self.type or self.meaning or self.presets)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyInfo:
    """One key. Texts are plain; values are written as in a file.

    path: where it stands, ``[]`` for entries of lists. refused: ``planned`` or ``not applicable``, with the reason as
    its meaning; then nothing else is known. inherited: keys that give it to several sources or sets at once.
    inner: keys below a section, with type, default and meaning. only: models that have this key, empty when all do.
    measured: what its values cost, where that was measured.
    """

    path: str
    meaning: str
    refused: str = ""
    type: str = ""
    choices: tuple[Any, ...] = ()
    default: str = ""
    planned_values: Mapping[str, str]
    only: tuple[str, ...] = ()
    models: tuple[ModelNote, ...] = ()
    inherited: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    may_change_on_resume: bool = False
    conflicts: tuple[Conflict, ...] = ()
    needed_by: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()
    inner: tuple[tuple[str, str, str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"inner": [dict(zip(("key", "type", "default", "meaning"), row, strict=True))
                                         for row in self.inner]}  # fmt: skip


def explain_key(found: Found, keys: Keys) -> KeyInfo:
    """What is known about a key that ``Keys.find`` gave."""
    if found.refused is not None or found.key is None:
        kind, why = found.refused or ("", "")
        return KeyInfo(path=found.path, meaning=why, refused=kind, planned_values={})
    key = found.key
    section = key.path.split(".")[0]
    inner = tuple(_row(each, keys) for each in _children(key))
    return KeyInfo(
        path=key.path,
        meaning=plain(meaning(key.field.description)),
        type="section" if inner else plain(type_words(key.section, key.name)),
        choices=() if inner else tuple(choices(key.section, key.name)),
        default=plain(default_words(key.field)),
        planned_values={} if inner else refused_values(tuple(str(part) for part in _parts(key.path))),
        only=found.models,
        models=() if inner else _model_notes(key, keys, found.models),
        inherited=_inherited(key, keys),
        commands=READERS.get(section, ()),
        may_change_on_resume=free_on_resume(".".join(map(str, names(key.path)))),
        conflicts=() if inner else tuple(conflicts(key.path)),
        needed_by=() if inner else tuple(needed_by(key.path)),
        measured=tuple(str(each) for each in costs_of_key(key.path)),
        inner=inner,
    )


def plain(markdown: str) -> str:
    """Markdown of the reference without its marks."""
    return markdown.replace("`", "").replace("**", "")


def _inherited(key: Key, keys: Keys) -> tuple[str, ...]:
    found = []
    for above in ("data.sets[]", "data.defaults"):
        rest = key.path.removeprefix("data.sets[].sources[].").removeprefix("data.sets[].")
        first = keys.shared.get(names(f"{above}.{rest.split('.')[0]}"))
        if key.path.startswith("data.sets[].") and first is not None and first.field.description in INHERITED:
            found.append(f"{above}.{rest}")
    return tuple(found)


def _children(key: Key) -> list[Key]:
    """Keys one level below a section."""
    inner = [each for each in key.inner if each.__name__ != "EveryFields"]
    start = f"{key.path}{entry_suffix(key.field.annotation)}"
    found = [each for section in inner for each in schema_keys(section, start)]
    return [each for each in found if names(each.path)[:-1] == names(key.path)]


def _row(key: Key, keys: Keys) -> tuple[str, str, str, str]:
    kind = "section" if _children(key) else plain(type_words(key.section, key.name))
    text = plain(meaning(keys.where_it_acts(key).field.description))
    if key.field.description in INHERITED:
        text = f"For all of {INHERITED[key.field.description]}: {text}"
    return key.path, kind, plain(default_words(key.field)), text


def _model_notes(key: Key, keys: Keys, only: tuple[str, ...]) -> tuple[ModelNote, ...]:
    """What is different for each model; plugins that cannot be asked are passed over."""
    notes, catalog = [], keys.catalog
    for entry in catalog.entries(MODELS):
        if only and entry.name not in only:
            continue
        try:
            own = next((each for each in model_keys(catalog, entry.name) if each.path == key.path), key)
            note = ModelNote(
                model=entry.name,
                default=_defaults_of(key, entry.name, keys),
                type=_different(type_words(own.section, own.name), type_words(key.section, key.name)),
                meaning=_different(meaning(own.field.description), meaning(key.field.description)),
                presets=_presets(key, entry.name, catalog),
            )
        except UsageError:
            continue
        if note.says_something:
            notes.append(note)
    return tuple(notes)


def _different(own: str, shared: str) -> str:
    return "" if own == shared else plain(own)


def _presets(key: Key, family: str, catalog: Catalog) -> dict[str, str]:
    found = {}
    for name in preset_names(catalog, family):
        value = value_at(read_preset(catalog, f"{family}/{name}"), _parts(key.path))
        if value is not None:
            found[f"{family}/{name}"] = as_json(value)
    return found


def _defaults_of(key: Key, family: str, keys: Keys) -> str:
    """The default that a model fills in, by flavour where they differ; empty where it is the shared one."""
    shared = None if key.field.is_required() else key.field.get_default(call_default_factory=True)
    by_flavour = {name: value_at(document, _parts(key.path)) for name, document in _published(family, keys).items()}
    texts = {name: as_json(value) for name, value in by_flavour.items() if value is not None}
    if not texts or key.field.is_required() or set(texts.values()) == {as_json(shared)} or key.path == "model.flavour":
        return ""
    grouped: dict[str, list[str]] = {}
    for name, text in texts.items():
        grouped.setdefault(text, []).append(name)
    if len(grouped) == 1 and len(texts) == len(by_flavour):
        return next(iter(grouped))
    return ", ".join(f"{text} ({', '.join(flavours)})" for text, flavours in grouped.items())


def _published(family: str, keys: Keys) -> dict[str, dict[str, Any]]:
    """The smallest configuration with every default of each published flavour of a model; none without such."""
    if family not in keys.published:
        keys.published[family] = {}
        schema = model_schema(keys.catalog, family)
        for flavour in choices(schema, "flavour") or [None]:
            model = {"family": family} | ({"flavour": flavour} if flavour else {})
            try:
                config, facts = open_public(build_config(merged(SMALLEST, {"model": model}), schema), keys.catalog)
            except UsageError:
                continue
            keys.published[family][facts.flavour] = config.model_dump(mode="json", by_alias=True)
    return keys.published[family]


SMALLEST: Mapping[str, Any] = {
    "model": {"path": "weights.safetensors"},
    "data": {"sets": [{"sources": [{"id": "a", "path": "a"}]}]},
    "optimizer": {"lr": 1e-4},
    "train": {"steps": 1},
    "checkpoint": {"dir": "out"},
}


def _parts(path: str) -> Path:
    """A key of the schema as a path in a document: of lists the first entry."""
    parts: list[str | int] = []
    for part in path.split("."):
        parts.append(part.removesuffix("[]"))
        if part.endswith("[]"):
            parts.append(0)
    return tuple(parts)
