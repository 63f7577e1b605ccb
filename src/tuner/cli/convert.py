"""Rewrite an adapter file in another format. The values are kept; the source is not touched."""

from __future__ import annotations

import argparse
from pathlib import Path

from tuner.cli.console import out, out_json
from tuner.core.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="the adapter file")
    parser.add_argument("target", metavar="TARGET", help="the file to write")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="the format to write")
    parser.add_argument("--model", metavar="NAME", help="the model the adapter is for, when several are installed")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET when it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.registry import MODELS, Catalog

    catalog = Catalog()
    names = [entry.name for entry in catalog.entries(MODELS)]
    if arguments.model is None and len(names) != 1:
        raise UsageError(
            "which model is this adapter for?", why=f"installed: {', '.join(names)}", fix="add --model NAME"
        )
    name = arguments.model or names[0]
    reference = catalog.model(name).key_maps
    if reference is None:
        raise UsageError(f"the model {name!r} declares no adapter formats")
    maps = catalog.load(catalog.entry(MODELS, name), "descriptor", reference)

    from tuner.core.adapters.convert import convert_adapter

    source, target = Path(arguments.source), Path(arguments.target)
    done = convert_adapter(source, target, arguments.to, maps, overwrite=arguments.overwrite)
    if arguments.json:
        out_json({"from": done.source_format, "to": done.format, "modules": done.modules, "path": str(done.path)})
    else:
        out(f"{done.source_format} -> {done.format}: {done.modules} modules, {done.path}")
    return 0
