"""``tuner config import sd-scripts``: a command line, a ``--config_file``, or a data set file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuner.core.config.document import dotted
from tuner.core.config.locations import WEIGHT_SUFFIXES, is_hub_id
from tuner.core.errors import UsageError
from tuner.core.importing.apply import Table, Translation, translate
from tuner.core.importing.families import Choice, choices, choose, of_model, schema_of
from tuner.core.importing.finish import finish
from tuner.core.importing.report import Imported
from tuner.core.importing.sd_scripts_convert import NETWORK
from tuner.core.importing.sd_scripts_data import PLACES, DataImport, given_text, is_data_option
from tuner.core.importing.sd_scripts_options import GENERAL, LAUNCHER
from tuner.core.importing.sets import write_sets
from tuner.core.importing.shell import UNFILLED
from tuner.core.importing.source import (
    CommandLine,
    Document,
    Given,
    command_line,
    located,
    read_document,
    read_text,
    script_command,
    shown_value,
)
from tuner.core.registry import Catalog

TOOL = "sd-scripts"
_NESTED = ("network_args", "optimizer_args", "lr_scheduler_args")
_DATA_FILES = (".toml", ".json")


def import_files(paths: Sequence[Path], catalog: Catalog, *, model: str | None, base: Path) -> Imported:
    """Import files: a command line as text, a file of options, a data set, or several of them together."""
    line: CommandLine | None = None
    options: list[Given] = []
    data: Document | None = None
    home = base
    scripts = {name for each in choices(catalog, TOOL) for name in each.family.names}
    for path in paths:
        if path.suffix.lower() not in _DATA_FILES:
            if line is not None:
                raise UsageError("two command lines cannot be one run", where=str(path), fix="import one at a time")
            line = script_command(read_text(path), path.name, scripts.__contains__)
            home = path.absolute().parent
            continue
        document = read_document(path)
        if _is_data_set(document.value):
            data = document
        else:
            options += _file_options(document)
    return _import(line or CommandLine((), None, ()), options, data, catalog, model, base, home)


def _is_data_set(value: Any) -> bool:
    """Whether a file describes data sets; options may stand in tables of any name, ``general`` too."""
    if not isinstance(value, dict):
        return False
    general = value.get("general")
    named = not isinstance(general, dict) or all(is_data_option(key) for key in general)
    return "datasets" in value or ("general" in value and named)


def import_words(words: Sequence[str], catalog: Catalog, *, model: str | None, base: Path) -> Imported:
    """Import a command line that is given as words."""
    placed = [(word, f"word {number}") for number, word in enumerate(words, 1)]
    return _import(command_line(placed), [], None, catalog, model, base, base)


def _import(
    line: CommandLine,
    options: list[Given],
    data: Document | None,
    catalog: Catalog,
    model: str | None,
    base: Path,
    home: Path,
) -> Imported:
    into = Translation()
    for beside, note in line.beside:
        into.add(beside, "mapped" if note == "filled in" else "not_applicable", note).beside = True
    from_files, from_line = list(options), []
    for each in line.options:
        if each.name != "config_file":
            from_line.append(each)
            continue
        name = given_text(each)
        path = located(name if Path(name).suffix else f"{name}.toml", home, base)
        if path is not None:
            into.add(each, "mapped", "its options are rows of their own")
            from_files += _file_options(read_document(path))
        else:
            into.add(each, "missing", "the file is not there: its options are not in the result")
    given = _spread([*from_files, *from_line], into)
    only_data = data is not None and line.script is None and not given
    choice = _choice(choices(catalog, TOOL), line, given, model)
    if choice is None and not only_data:
        raise UsageError(
            "which model is this for?",
            why=f"no installed model knows the script {line.script.value!r}" if line.script else "no script is named",
            fix="add --model NAME",
        )
    if choice is not None:
        _family(into, line, choice)
    values = _run_options(into, line, given, choice) if not only_data else {}
    _data(into, given, data, base, home, needed=not only_data)
    _caches(into, values)
    if not only_data:
        _loraplus(into)
        _whole_weights(into)
        _prompts(into, base)
        _local_weights(into.config.get("model", {}), base)
        result = finish(TOOL, into, schema_of(catalog, choice))
        result.open += _unfilled(result)
        if data is None and not any(each.name in PLACES for each in given):
            result.open.append("the source names no images: write their folder into data.sets[0].sources[0].path")
        return result
    # A data section says nothing about caches: the run that includes it has to.
    result = finish(TOOL, into, schema_of(catalog, choice), only_data=True)
    unsaid = result.config.pop("cache", {})
    result.rows = [row for row in result.rows if not any(path[0] == "cache" for path in row.keys)]
    result.open += [f"images or captions are drawn anew: set cache.{key} to {value!r}" for key, value in unsaid.items()]
    return result


def _local_weights(section: dict[str, Any], base: Path) -> None:
    """Weight files are always on the machine there; here a path of three parts may be a place in a repository."""
    for key, value in section.items():
        if isinstance(value, dict):
            _local_weights(value, base)
        elif isinstance(value, str) and value.endswith(WEIGHT_SUFFIXES) and is_hub_id(value, base):
            section[key] = f"./{value}"


def _unfilled(result: Imported) -> list[str]:
    """Options that hold a variable of the shell which the text does not set."""
    held = [(row, UNFILLED.search(shown_value(row.value))) for row in result.rows if row.keys and row.value is not None]
    return [f"{row.option} holds {found[0]}, which is not set in the source: write its value into {dotted(row.keys[0])}"
            for row, found in held if found]  # fmt: skip


def _file_options(document: Document) -> list[Given]:
    """Options of a ``--config_file``; its tables have no meaning and are flattened."""
    found = []
    if not isinstance(document.value, dict):
        raise UsageError("neither options nor a data set: it is no table", where=document.name)
    for key, value in document.value.items():
        if isinstance(value, dict):
            found += [Given(name, inner, document.where((key, name)), f"{key}.{name}") for name, inner in value.items()]
        else:
            found.append(Given(key, value, document.where((key,))))
    return found


def _spread(given: Sequence[Given], into: Translation) -> list[Given]:
    """Options that are lists of ``key=value``, as one option each; a list that is given again replaces the first."""
    found = []
    last = {each.name: each for each in given}
    for each in given:
        if each.name not in _NESTED:
            found.append(each)
            continue
        if last[each.name] is not each:
            into.add(each, "mapped", f"given again in {last[each.name].where}, which wins")
            continue
        entries = each.value if isinstance(each.value, list) else [each.value]
        if not entries:
            into.add(each, "mapped", "empty")
        for entry in entries:
            name, _, value = str(entry).partition("=")
            found.append(
                Given(f"{each.name}.{name.strip()}", value.strip(), each.where, f"{each.label} {name.strip()}")
            )
    return found


def _choice(known: list[Choice], line: CommandLine, given: Sequence[Given], model: str | None) -> Choice | None:
    if line.script is not None:
        name = line.script.value
        found = choose(known, lambda family: name in family.names, model)
        if found is not None:
            return found
    modules = [given_text(each) for each in given if each.name == "network_module"]
    found = choose(known, lambda family: bool(set(modules) & set(family.modules)), model) if modules else None
    if found is None and model is not None:
        found = of_model(known, model, TOOL)
    return found


def _family(into: Translation, line: CommandLine, choice: Choice) -> None:
    settings = {"model.family": choice.model, **choice.family.settings}
    if line.script is not None:
        into.add(Given("script", None, line.script.where, line.script.label), "mapped", "", settings)
    else:
        for key, value in settings.items():
            into.put(key, value)


def _run_options(into: Translation, line: CommandLine, given: Sequence[Given], choice: Choice | None) -> dict[str, Any]:
    """Everything that is not about data sets."""
    own = [each for each in given if not is_data_option(each.name) and each.name not in PLACES]
    names = {each.name for each in own}
    shadowed = [each for each in line.launcher if each.name in names]
    for each in shadowed:
        into.add(each, "mapped", "the script's own option wins")
    translate(into, [each for each in line.launcher if each not in shadowed], Table(LAUNCHER), defaults=False)
    family = choice.family if choice else None
    facts: dict[str, Any] = {NETWORK: family is None or not {"train.mode", "network.type"} & set(family.settings)}
    return translate(into, own, Table([*(family.options if family else ()), *GENERAL]), facts=facts)


def _data(
    into: Translation, given: Sequence[Given], data: Document | None, base: Path, home: Path, *, needed: bool
) -> None:
    """``data.sets`` from a data set file, or from the folders that the command line names."""
    places = {each.name: each for each in given if each.name in PLACES}
    line = [each for each in given if is_data_option(each.name)]
    file = places.pop("dataset_config", None)
    path = None if file is None or data is not None else located(given_text(file), home, base)
    if path is not None:
        data = read_document(path)
    if data is not None:
        importer = DataImport(into, line)
        if file is not None:
            into.add(file, "mapped", "its options are rows of their own")
        for each in places.values():
            into.add(each, "not_applicable", "dataset_config wins, there too")
        write_sets(into, importer.document(data))
        importer.tell_overridden()
    elif "in_json" in places:
        write_sets(into, DataImport(into, line).table(places["in_json"], places.get("train_data_dir")))
    elif file is None and places:
        folders = [(each, Path(base, given_text(each)), name == "reg_data_dir") for name, each in places.items()]
        write_sets(into, DataImport(into, line).folders(folders))
    elif needed:
        write_sets(into, DataImport(into, line, known=False).placeholder(file))


def _whole_weights(into: Translation) -> None:
    """Whole models keep their weights in float32 there, unless told otherwise; here in ``precision.compute``."""
    train, precision, optimizer = (into.config.get(name, {}) for name in ("train", "precision", "optimizer"))
    if train.get("mode") != "full" or precision.get("compute") != "bf16" or "rounding" in optimizer:
        return
    note = "weights stay in float32 there and train in bfloat16 here; "
    if "schedulefree" in str(optimizer.get("name")):
        settings = {}
        note += "this optimizer loses small updates so: set precision.compute to fp32, or change it"
    else:
        settings = {"optimizer.rounding": "kahan"}
        note += "what rounding takes away is kept beside them"
    into.add(Given("full_bf16", False, "default"), "changed", note, settings)


def _caches(into: Translation, values: dict[str, Any]) -> None:
    """Captions and images that are drawn anew cannot be cached, and are not unless one asks for it there."""
    sets = into.config["data"]["sets"]
    captions = [source.get("captions", {}) for entry in sets for source in entry["sources"]]
    drawn = any(each.get(key) for each in captions for key in ("shuffle", "tag_dropout", "tag_warmup", "wildcards"))
    asked = values.get("cache_text_encoder_outputs") or values.get("cache_text_encoder_outputs_to_disk")
    if drawn and not asked:
        note = "captions are drawn anew at every visit; captions.variants would let them be cached"
        into.add(Given("cache_text_encoder_outputs", False, "default"), "default", note, {"cache.text": "off"})
    moving = any(entry.get("crop") for entry in sets) or any(
        source.get("augment", {}).get("color") for entry in sets for source in entry["sources"]
    )
    if moving and not (values.get("cache_latents") or values.get("cache_latents_to_disk")):
        note = "images are cut or coloured anew at every visit"
        into.add(Given("cache_latents", False, "default"), "default", note, {"cache.latents": "off"})
    affixed = any(each.get(key) for each in captions for key in ("prefix", "suffix", "fixed_marker", "wildcards"))
    if affixed and asked:
        for row in into.rows:
            if row.name in ("caption_prefix", "caption_suffix", "enable_wildcard"):
                row.status = "changed"
                row.note = "with cached text encodings it was not applied there; here it is"


def _loraplus(into: Translation) -> None:
    """A ratio for everything must not name text encoders where none trains."""
    ratios = into.config.get("optimizer", {}).get("loraplus", {})
    if "text_encoder" not in ratios or len(into.config.get("train", {}).get("components", ())) > 1:
        return
    place = ("optimizer", "loraplus", "text_encoder")
    for row in into.rows:
        if place in row.keys and len(row.keys) > 1:
            row.keys.remove(place)
            del ratios["text_encoder"]


_UNUSED_FLAGS = re.compile(r" --(ss(?! +(?:euler|heun)(?: |$))|cn|ctr|rcfg)\b", re.MULTILINE)


def _prompts(into: Translation, base: Path) -> None:
    """Flags of a prompt file that previews here refuse."""
    row = next((row for row in into.rows if ("sample", "prompts") in row.keys), None)
    prompts = into.config.get("sample", {}).get("prompts")
    if row is None or not isinstance(prompts, str):
        return
    path = Path(base, prompts)
    if not path.is_file():
        row.note = f"{row.note}; the file is not there yet"
        return
    flags = sorted(set(_UNUSED_FLAGS.findall(read_text(path))))
    if flags:
        listed = ", ".join(f"--{flag}" for flag in flags)
        row.note = f"{row.note}; previews cannot use {listed}: take these flags out of the file"
