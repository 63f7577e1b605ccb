"""Print the JSON Schema of configurations or a configuration with every default, or take over another trainer's."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tuner.cli import config_import
from tuner.cli.console import out, out_json, warn
from tuner.cli.settings import add_config_arguments, load

if TYPE_CHECKING:
    from tuner.core.registry import Catalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    schema = actions.add_parser("schema", help="JSON Schema, for editors that complete")
    schema.add_argument("--model", metavar="NAME", help="include the keys of this model")
    resolve = actions.add_parser(
        "resolve", help="the configuration with every default, as far as the model's files are here"
    )
    add_config_arguments(resolve)
    config_import.add_arguments(actions.add_parser("import", help=config_import.SUMMARY))
    parser.set_defaults(command="config resolve")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.registry import Catalog

    catalog = Catalog()
    if arguments.action == "import":
        return config_import.run(arguments, catalog)
    if arguments.action == "schema":
        return _schema(arguments.model, catalog)
    from tuner.core.config import resolved_text
    from tuner.core.errors import NotHereError
    from tuner.core.registry import open_known, typed_config

    raw = load(arguments, catalog)
    config = typed_config(raw, catalog)
    try:
        config, facts, absent = open_known(config, catalog, raw)
        if absent is not None:
            place = absent.where or absent.what
            warn(f"{place} is not here: what weights decide is that of the published model {facts.flavour!r}")
    except NotHereError as unknown:
        warn(f"{unknown.where} is not here, and what weights decide is left open: {unknown.what}")
    out(resolved_text(config).rstrip())
    return 0


def _schema(model: str | None, catalog: Catalog) -> int:
    from tuner.core.config import ModelConfigBase, run_schema
    from tuner.core.registry import model_schema

    section = ModelConfigBase if model is None else model_schema(catalog, model)
    schema = run_schema(section).model_json_schema(by_alias=True, mode="validation")
    out_json({"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema)
    return 0
