"""``tuner config import simpletuner``: ``config.json`` or ``config.env`` with the data backends that it names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tuner.core.config.foreign import PREVIEWS, ignored, option
from tuner.core.errors import UsageError
from tuner.core.importing import lycoris
from tuner.core.importing.apply import Table, Translation, translate
from tuner.core.importing.families import Choice, choices, choose, of_model, schema_of
from tuner.core.importing.finish import finish
from tuner.core.importing.report import Imported, Row
from tuner.core.importing.shell import words_of
from tuner.core.importing.simpletuner_data import Backends
from tuner.core.importing.simpletuner_options import ENV_NAMES, GENERAL
from tuner.core.importing.source import Document, Given, command_line, located, read_document, read_env
from tuner.core.registry import Catalog

TOOL = "simpletuner"
_NAMES = ("config.json", "config.toml", "config.env")
_BACKENDS = "data_backend_config"
_LIBRARY = "user_prompt_library"
FALLBACKS = (
    "resolution", "resolution_type", "aspect_bucket_alignment", "aspect_bucket_rounding", "caption_strategy",
    "instance_prompt", "prepend_instance_prompt", "only_instance_prompt", "disable_multiline_split",
    "minimum_image_size", "maximum_image_size", "target_downsample_size",
)  # fmt: skip
_DATA = (
    option("caption_dropout_probability", kind="float"),
    *(option(name) for name in FALLBACKS),
    *ignored("parquet_caption_column parquet_filename_column", "name the columns in the data backend"),
    option("model_family", "model.family", "text"),
    option(_BACKENDS, note="its entries are rows of their own"),
)
"""Options of a run that its data backends fall back to, and those that are read here."""


def import_path(path: Path, catalog: Catalog, *, model: str | None, base: Path) -> Imported:
    """Import a folder with ``config.json``, ``.toml`` or ``.env``, one of these files, or a data backend file alone."""
    if path.is_dir():
        found = next((path / name for name in _NAMES if (path / name).is_file()), None)
        if found is None:
            raise UsageError(f"this folder has none of {', '.join(_NAMES)}", where=str(path))
        path = found
    beside: list[Given] = []
    if path.suffix.lower() not in (".json", ".toml"):
        families = [option for each in choices(catalog, TOOL) for option in each.family.options]
        given, beside = _env(path, {name for each in (*families, *_DATA, *GENERAL) for name in each.names})
    else:
        document = read_document(path)
        if isinstance(document.value, list):
            return _data_alone(document, catalog, model, base)
        if not isinstance(document.value, dict):
            raise UsageError("this is no configuration of SimpleTuner", where=str(path))
        given = [
            Given(name.lstrip("-").replace("-", "_"), value, document.where((name,)), name)
            for name, value in document.value.items()
        ]
    return _import(given, beside, path.absolute().parent, catalog, model, base)


_EXTRA = ("TRAINER_EXTRA_ARGS", "DEBUG_EXTRA_ARGS")
"""Variables that hold options as a command line would."""


def _env(path: Path, names: Collection[str]) -> tuple[list[Given], list[Given]]:
    """The options of a shell file, and the variables that are no options and are part of some."""
    found: list[Given] = []
    beside: list[Given] = []
    lines, used = read_env(path)
    for each in lines:
        name = ENV_NAMES.get(each.name, each.name.lower())
        if each.name in _EXTRA:
            words = [(word, each.where) for word, _ in words_of(each.value, path.name)]
            found += command_line(words).options
        elif each.name in used and name not in names:
            beside.append(each)
        else:
            found.append(Given(name, each.value, each.where, each.name))
    return found, beside


def _import(
    given: list[Given], beside: list[Given], home: Path, catalog: Catalog, model: str | None, base: Path
) -> Imported:
    into = Translation()
    for each in beside:
        into.add(each, "mapped", "filled in where other lines name it").beside = True
    choice = _choice(given, catalog, model)
    shared = Table([*choice.family.options, *_DATA, *GENERAL])
    asked = {each.name for each in given if each.value not in (None, "", False)}
    drawn = bool(asked & {"validation_prompt", _LIBRARY}) and "validation_disable" not in asked
    values = translate(into, given, shared, facts={PREVIEWS: drawn})
    into.config.setdefault("model", {})["family"] = choice.model
    for key, value in choice.family.settings.items():
        into.put(key, value)
    rows = {row.name: row for row in into.rows}
    _adapter(into, values, rows.get("lycoris_config"), home, base)
    _backends(into, values, rows.get(_BACKENDS), home, base)
    _prompts(into, values, rows, home, base)
    return finish(TOOL, into, schema_of(catalog, choice))


def _choice(given: list[Given], catalog: Catalog, model: str | None) -> Choice:
    known = choices(catalog, TOOL)
    names = [str(each.value) for each in given if each.name == "model_family"]
    found = choose(known, lambda family: bool(set(names) & set(family.names)), model) if names else None
    if found is None and model is not None:
        found = of_model(known, model, TOOL)
    if found is None:
        listed = ", ".join(name for each in known for name in each.family.names)
        why = f"model_family {names[0]!r} is none of: {listed}" if names else f"it names no model_family: {listed}"
        raise UsageError("which model is this for?", why=why, fix="add --model NAME")
    return found


def _adapter(into: Translation, values: Mapping[str, Any], row: Row | None, home: Path, base: Path) -> None:
    """``network`` from the file that describes an adapter of LyCORIS."""
    if row is None or values.get("lora_type") != "lycoris":
        return
    path = located(str(values["lycoris_config"]), home, base)
    if path is None:
        row.status, row.note = "missing", "the file is not there: set network.type and its keys"
        return
    document = read_document(path)
    if not isinstance(document.value, dict):
        raise UsageError("a LyCORIS file is an object", where=str(path))
    given = [Given(name, value, document.where((name,)), f"lycoris {name}") for name, value in document.value.items()]
    translate(into, given, Table(lycoris.FILE))


def _backends(into: Translation, values: Mapping[str, Any], row: Row | None, home: Path, base: Path) -> None:
    path = located(str(values[_BACKENDS]), home, base) if values.get(_BACKENDS) else None
    if path is not None:
        Backends(into, read_document(path), values, base).write()
        for each in into.rows:
            if each.name in FALLBACKS and not each.keys and not each.note:
                each.note = "every data backend says its own"
        return
    for each in into.rows:
        if each.name in FALLBACKS and not each.keys and not each.note:
            each.status, each.note = "missing", "for data backends that do not say it, and their file is not there"
    source = {"id": "images", "path": "images", "recursive": True, "captions": {"rule": "simpletuner"}}
    share = float(values.get("caption_dropout_probability", 0.1) or 0)
    if share:
        source["captions"] = {"rule": "simpletuner", "dropout": share}
    into.config["data"] = into.config.get("data", {}) | {
        "sets": [{"resolution": 1024, "buckets": {"rule": "simpletuner"}, "sources": [source]}]
    }
    if row is not None:
        row.status = "missing"
        row.note = "the file is not there: data.sets holds a source to fill in, or import the file on its own"
        row.keys.append(("data", "sets", 0, "sources", 0, "path"))
    dropped = next((each for each in into.rows if each.name == "caption_dropout_probability"), None)
    if dropped is not None and share:
        dropped.keys.append(("data", "sets", 0, "sources", 0, "captions", "dropout"))


def _prompts(
    into: Translation, values: Mapping[str, Any], rows: Mapping[str, Row], home: Path, base: Path
) -> None:  # fmt: skip
    """``sample.prompts`` from the one prompt and the library."""
    prompts: list[str] = []
    if values.get("validation_prompt"):
        prompts.append(str(values["validation_prompt"]))
        rows["validation_prompt"].keys.append(("sample", "prompts"))
    if values.get(_LIBRARY):
        path = located(str(values[_LIBRARY]), home, base)
        if path is None:
            rows[_LIBRARY].status = "missing"
            rows[_LIBRARY].note = "the file is not there: its prompts are not in the result"
        else:
            library = read_document(path).value
            texts = [str(each) for each in (library.values() if isinstance(library, Mapping) else library)]
            prompts += [text for text in texts if text not in prompts]
            rows[_LIBRARY].keys.append(("sample", "prompts"))
    if prompts:
        into.put("sample.prompts", prompts)


def _data_alone(document: Document, catalog: Catalog, model: str | None, base: Path) -> Imported:
    into = Translation()
    Backends(into, document, {}, base).write()
    choice = None if model is None else of_model(choices(catalog, TOOL), model, TOOL)
    return finish(TOOL, into, schema_of(catalog, choice), only_data=True)
