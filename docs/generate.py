"""Writes the pages of docs/reference that follow from the code: configuration keys, hooks, command line.

    python docs/generate.py            write them
    python docs/generate.py --check    exit with 1 when a page is not what the code says

A test does the second, so a change of the schema, of a hook or of a command comes with its page.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tuner.core.config.describe import (
    INHERITED,
    as_json,
    default_words,
    entry_suffix,
    meaning,
    sections_in,
    type_words,
)

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py from the code. Change the code, then run it again. -->\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a page is out of date")
    checking = parser.parse_args(arguments).check
    stale = [name for name, make in PAGES.items() if not _is_current(REFERENCE / name, make())]
    for name in stale:
        if checking:
            say(f"docs/reference/{name} is out of date: python docs/generate.py")
        else:
            (REFERENCE / name).write_text(PAGES[name](), encoding="utf-8")
            say(f"wrote docs/reference/{name}")
    return 1 if checking and stale else 0


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


# --- configuration ----------------------------------------------------------------------------------------------------


def config_page() -> str:
    """Every key of the schema, the model sections of the built-in plugins, and the keys that are refused today."""
    from tuner.core.config.run import RunConfig

    parts = [NOTE, "# Configuration keys\n", CONFIG_INTRO]
    for name, field in RunConfig.model_fields.items():
        key = field.alias or name
        sections = sections_in(field.annotation)
        if key == "model":
            parts += [*_section(key, sections[0], text=field.description), *_model_sections()]
        elif sections:
            parts += _section(key, sections[0])
        else:
            kind = _cell(type_words(RunConfig, name))
            parts += [f"## {key}\n", f"{_text(field)} {kind[0].upper()}{kind[1:]}, default {default_words(field)}.\n"]
    return "\n".join([*parts, *_planned()])


CONFIG_INTRO = """\
A configuration is one JSON document; `//` and `/* */` comments are allowed. Values come from the preset, the file, the
environment (`TUNER__OPTIMIZER__LR=2e-4`) and `--set optimizer.lr=2e-4`, the later wins. Relative paths start at the
folder of the file. Unknown keys are errors, and so are keys that the rest of the document leaves without effect.

`[]` in a heading stands for the entries of a list. *Every* is a number of steps, a share of the run such as `"10%"`, or
an object with `steps`, `epochs` or `minutes`. A *step* is one optimizer update.
"""


def _section(path: str, model: type[BaseModel], *, text: str | None = None, depth: int = 2) -> Iterator[str]:
    """A heading, the section's docstring, a table of its keys, then the sections inside it."""
    yield f"{'#' * depth} {path}\n"
    yield f"{meaning(text or model.__doc__)}\n"
    yield "| Key | Type | Default | Meaning |\n|---|---|---|---|"
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        if field.description in INHERITED:
            yield f"| `{key}` | as in a source | none | For all sources of the set that do not say otherwise. |"
            continue
        yield f"| `{key}` | {_cell(type_words(model, name))} | {default_words(field)} | {_text(field)} |"
        inner += [(f"{path}.{key}{entry_suffix(field.annotation)}", each) for each in sections_in(field.annotation)]
    yield ""
    for place, each in inner:
        if each.__name__ == "DefaultsConfig":
            yield from _defaults_section(place, each)
        elif each.__name__ not in ("EveryFields", "ComponentSource"):
            yield from _section(place, each, depth=3)


def _defaults_section(place: str, model: type[BaseModel]) -> Iterator[str]:
    keys = ", ".join(f"`{name}`" for name in model.model_fields)
    yield f"### {place}\n"
    yield f"{meaning(model.__doc__)} It may hold {keys}; each means what it means in a set or source.\n"


def _model_sections() -> Iterator[str]:
    """What each built-in model changes or adds, and its presets."""
    from tuner.core.config.model import ComponentSource, ModelConfigBase
    from tuner.core.registry import Catalog, model_schema
    from tuner.core.registry.catalog import MODELS
    from tuner.core.registry.presets import preset_names, read_preset

    yield from _section("model: places of parts", ComponentSource, depth=3)
    catalog = Catalog()
    for entry in catalog.entries(MODELS):
        if not entry.builtin:
            continue
        schema = model_schema(catalog, entry.name)
        yield f"### model of {entry.name}\n"
        yield f"{meaning(schema.__doc__)}\n"
        yield "| Key | Type | Default | Meaning |\n|---|---|---|---|"
        for name, field in schema.model_fields.items():
            if name in schema.__annotations__ or name not in ModelConfigBase.model_fields:
                yield f"| `{name}` | {_cell(type_words(schema, name))} | {default_words(field)} | {_text(field)} |"
        yield "\nPresets:\n"
        for preset in preset_names(catalog, entry.name):
            settings = _flat({k: v for k, v in read_preset(catalog, f"{entry.name}/{preset}").items() if k != "model"})
            yield f"- `{entry.name}/{preset}`: " + ", ".join(f"`{key}` = `{value!r}`" for key, value in settings)
        yield ""


def _planned() -> Iterator[str]:
    from tuner.core.config.planned import NOT_APPLICABLE, PLANNED, PLANNED_VALUES

    yield "## Planned keys\n"
    yield "Refused today with a message that says so; they belong to features that are not built yet.\n"
    yield "| Key | For |\n|---|---|"
    rows = [(key, "", why) for key, why in PLANNED.items()]
    rows += [(key, value, why) for key, values in PLANNED_VALUES.items() for value, why in values.items() if why]
    for key, value, why in sorted(rows):
        shown = key.replace(".*", "[]") if key.startswith(("data", "log")) else key
        yield f"| `{shown}`{f' = `{value}`' if value else ''} | {_cell(why)} |"
    yield ""
    yield "## Keys without a use here\n"
    yield "Settings of other trainers that are always so here, or mean nothing. They are refused with these reasons.\n"
    yield "| Key | Why |\n|---|---|"
    for key, why in sorted(NOT_APPLICABLE.items()):
        yield f"| `{key}` | {_cell(why)} |"
    yield ""


def _flat(values: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in values.items():
        found += _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else [(f"{path}{key}", value)]
    return found


def _text(field: FieldInfo) -> str:
    return _cell(meaning(field.description))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- hooks ------------------------------------------------------------------------------------------------------------


def hooks_page() -> str:
    """Hook signatures and docstrings, and the data classes they pass."""
    import tuner
    from tuner.core import costs, hooks, types

    version = ".".join(map(str, types.API_VERSION))
    parts = [NOTE, "# Hooks\n", f"{_paragraphs(hooks.__doc__)}\n", f"Version of the hook API: **{version}**.\n"]
    groups = (
        ("Model hooks", "A model plugin implements all of them.", hooks.MODEL_HOOKS),
        ("Default hooks", "The core implements them; a model plugin may.", hooks.DEFAULT_HOOKS),
        ("Run hooks", "For extensions; every implementation is called.", hooks.RUN_HOOKS),
    )
    for title, text, names in groups:
        parts += [f"## {title}\n", f"{text}\n"]
        for name in names:
            function = getattr(hooks, name)
            parts += [f"### {name}\n", f"```python\n{_signature(name, function)}\n```\n"]
            parts += [f"{_paragraphs(function.__doc__)}\n"]
    parts += ["## Data classes\n", "All are imported from `tuner`.\n"]
    for name in _class_names(types, tuner.__all__):
        parts += _class_part(name, getattr(types, name))
    parts += ["## Costs\n", f"{_paragraphs(costs.__doc__)}\n", "All are imported from `tuner.core.costs`.\n"]
    for name in _class_names(costs):
        parts += _class_part(name, getattr(costs, name))
    return "\n".join(parts)


def _signature(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    arguments = [f"    {each.name}: {each.annotation}," for each in signature.parameters.values()]
    inside = "\n".join(["", *arguments, ""]) if len(arguments) > 1 else "".join(arguments).strip(" ,")
    return f"def {name}({inside}) -> {signature.return_annotation}"


def _class_names(module: Any, among: Collection[str] | None = None) -> list[str]:
    """Data classes of a module in the order of the file, those in ``among`` alone where it is given."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return [name for name in names if among is None or name in among]


def _class_part(name: str, value: Any) -> Iterator[str]:
    yield f"### {name}\n"
    yield f"{_paragraphs(value.__doc__)}\n"
    yield "| Field | Type | Default |\n|---|---|---|"
    for field in dataclasses.fields(value):
        if field.default is not dataclasses.MISSING:
            default = f"`{field.default!r}`"
        elif field.default_factory is not dataclasses.MISSING:
            default = f"`{field.default_factory()!r}`"
        else:
            default = "**required**"
        yield f"| `{field.name}` | `{_cell(str(field.type))}` | {default} |"
    yield ""


def _paragraphs(text: str | None) -> str:
    """A docstring as Markdown: paragraphs stay, sentences that explain an argument (``name: ...``) become a list."""
    blocks = inspect.cleandoc(text or "").replace("``", "`").split("\n\n")
    return "\n\n".join(_listed(" ".join(block.split())) for block in blocks)


def _listed(block: str) -> str:
    names = r"[a-z_]+(?:, [a-z_]+)*"
    listed = re.sub(rf"(?:^|(?<=[.] ))({names}): ", r"\n- `\1`: ", block)
    # The first item of a list needs an empty line before it, and what follows the list one after it.
    listed = re.sub(r"(?<=\S) ?\n- ", "\n- ", listed).strip()
    listed = re.sub(r" (?=Raises )", "\n\n", listed) if "\n- " in f"\n{listed}" else listed
    first, mark, rest = listed.partition("\n- ")
    return f"{first}\n\n- {rest}" if mark and not first.startswith("- ") else listed


# --- command line -----------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Usage, arguments and options of every command."""
    from tuner.cli.main import COMMANDS, command_parser

    parts = [NOTE, "# Command line\n", CLI_INTRO]
    for name in COMMANDS:
        module = importlib.import_module(f"tuner.cli.{name}")
        parts += [f"## tuner {name}\n", f"{meaning(module.__doc__)}\n"]
        parser = command_parser(name)
        actions = next((each for each in parser._actions if isinstance(each, argparse._SubParsersAction)), None)
        if actions is None:
            parts += _command(f"tuner {name}", parser)
            continue
        helps = {each.dest: each.help for each in actions._choices_actions}
        for action, inner in actions.choices.items():
            parts += [f"### tuner {name} {action}\n", f"{_sentence(helps[action])}\n"]
            parts += _command(f"tuner {name} {action}", inner)
    return "\n".join(parts)


CLI_INTRO = """\
`tuner` and `python -m tuner` are the same. `tuner --version` prints the version, `tuner COMMAND --help` the help.

Exit codes: 0 done, 2 something has to be changed first (the message says what), 3 done, but part of what was asked for
is left out (`config import`) or some of several runs failed (`train`), 130 interrupted.
"""


def _command(usage: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    words, rows = [usage], []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = action.metavar or action.dest
        if not action.option_strings:
            word = shown = str(value)
        else:
            shown = action.option_strings[-1]
            if action.nargs != 0:
                shown += f" [{value}]" if action.nargs == "?" else f" {value}"
            word = shown
        optional = not action.required
        repeat = "..." if isinstance(action, argparse._AppendAction) else ""
        words.append(f"[{word}]{repeat}" if optional else word)
        rows.append(f"| `{shown}` | {_cell(_sentence(action.help))} |")
    yield f"```text\n{' '.join(words)}\n```\n"
    yield "| Argument | Meaning |\n|---|---|"
    yield from rows
    yield ""


def _sentence(text: str | None) -> str:
    text = (text or "The name.").strip()
    return f"{text[0].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


# --- options of other trainers ----------------------------------------------------------------------------------------

IMPORT_INTRO = """\
What `tuner config import` makes of each option. A key may be refused at the end because the rest of the configuration
leaves it without effect, or because it is planned and not built: the report of an import has the last word.
"""
_SAMPLES: dict[str, tuple[Any, ...]] = {
    "flag": (True,),
    "int": (2,),
    "float": (0.5,),
    "list": (["0.5"],),
    "literal": ([1] * 5, [1] * 6),
}


def sd_scripts_page() -> str:
    """Every option of sd-scripts that an import knows."""
    from tuner.core.importing.sd_scripts_data import OPTIONS, PLACES
    from tuner.core.importing.sd_scripts_options import GENERAL, LAUNCHER

    parts = [NOTE, "# Options of sd-scripts\n", IMPORT_INTRO, "## Of every script\n", *_option_table(GENERAL)]
    parts += ["## Of a data set\n", "Also on a command line, where the levels say so. Where the data is: "]
    parts[-1] += ", ".join(f"`{name}`" for name in PLACES) + ".\n"
    parts.append("| Option | Levels | Here | Note |\n|---|---|---|---|")
    for name, known in OPTIONS.items():
        key = known.key.removeprefix("set.")
        parts.append(f"| `{name}` | {', '.join(known.levels)} | {f'`{key}`' if key else ''} | {_cell(known.note)} |")
    parts += ["", *_plugin_tables("sd-scripts"), "## Of the launcher\n", *_option_table(LAUNCHER)]
    return "\n".join(parts)


def simpletuner_page() -> str:
    """Every option of SimpleTuner that an import knows."""
    from tuner.core.importing.lycoris import FILE
    from tuner.core.importing.simpletuner_data import FIXED
    from tuner.core.importing.simpletuner_options import ENV_NAMES, GENERAL

    parts = [NOTE, "# Options of SimpleTuner\n", IMPORT_INTRO, "## Of every model\n", *_option_table(GENERAL)]
    parts += ["## Of the file that lycoris_config names\n", *_option_table(FILE)]
    parts += ["## Of a data backend\n", "| Key | Note |\n|---|---|"]
    for name, known in FIXED.items():
        note = known if isinstance(known, str) else getattr(known, "why", "") or getattr(known, "note", "")
        status = {"not_built": "not built: ", "not_applicable": "not applicable: "}.get(
            getattr(known, "status", ""), ""
        )
        parts.append(f"| `{name}` | {status}{_cell(note) or 'taken over'} |")
    parts += ["", *_plugin_tables("simpletuner"), "## Names in config.env\n"]
    parts += ["Every name is its option in capitals, but for these:\n", "| Name | Option |\n|---|---|"]
    parts += [f"| `{name}` | `{option}` |" for name, option in ENV_NAMES.items()]
    return "\n".join([*parts, ""])


def _plugin_tables(tool: str) -> Iterator[str]:
    from tuner.core.importing.families import choices
    from tuner.core.registry import Catalog

    for choice in choices(Catalog(), tool):
        names = ", ".join(f"`{name}`" for name in choice.family.names)
        said = {"model.family": choice.model, **choice.family.settings}
        yield f"## Of {choice.family.names[0].removesuffix('.py')}\n"
        yield f"{names}: " + ", ".join(f"`{key}` = `{as_json(value)}`" for key, value in said.items()) + ".\n"
        yield from _option_table(choice.family.options)


def _option_table(options: Iterable[Any]) -> Iterator[str]:
    yield "| Option | Here | Default there | Note |\n|---|---|---|---|"
    for option in options:
        names = ", ".join(f"`{name}`" for name in option.names)
        keys = ", ".join(f"`{key}`" for key in _keys_of(option))
        status = {"not_built": "not built: ", "not_applicable": "not applicable: "}.get(option.refused, "")
        words = [f"{status}{option.note}"] if option.note else []
        words += [f"`{value}`: {made.why}" for value, made in option.values.items() if hasattr(made, "why")]
        words += [f"only with `{option.needs[0]}`"] if option.needs else []
        default = "" if option.default is None else f"`{as_json(option.default)}`"
        yield f"| {names} | {keys} | {default} | {_cell('; '.join(words))} |"
    yield ""


def _keys_of(option: Any) -> list[str]:
    """The keys that an option may set; those of a conversion are found by trying it."""
    if option.refused:
        return []
    if option.convert is None:
        return [option.key] if option.key else []
    found: dict[str, None] = {}
    samples = _SAMPLES.get(option.kind, ("sigma_sqrt", "chroma", "single", "0-3", "rest=1", "2", "cosine", "bf16"))
    for value in (*samples, option.default):
        given = {"script.network": True, "loss_type": "huber", option.names[0]: value, "save_every_n_steps": 10}
        given |= {"network_args.train_t5xxl": True, "max_train_epochs": 0, "*": option.names[0].replace("*", "name")}
        try:
            made = option.convert(value, given)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        found |= dict.fromkeys(getattr(made, "keys", None) or ())
    return [key.removesuffix("[]") for key in found]


PAGES: dict[str, Callable[[], str]] = {
    "config.md": config_page,
    "hooks.md": hooks_page,
    "cli.md": cli_page,
    "import-sd-scripts.md": sd_scripts_page,
    "import-simpletuner.md": simpletuner_page,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
