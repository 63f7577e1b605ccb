"""``tuner config import``: a configuration of another trainer, and what became of each of its lines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.cli.console import heading, out, out_json, table, warn
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.importing.report import Imported
    from tuner.core.registry import Catalog

TOOLS = ("sd-scripts", "simpletuner")
SUMMARY = "translate a configuration of kohya-ss/sd-scripts or bghira/SimpleTuner, and report every option"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tool", metavar="PROGRAM", choices=TOOLS, help=" or ".join(TOOLS))
    parser.add_argument(
        "source",
        nargs="+",  # with "*" argparse would give it nothing once an option follows PROGRAM
        metavar="SOURCE",
        help="files (a command line as text, TOML, JSON, .env) or a folder; or -- and then the command line itself",
    )
    parser.add_argument("--model", metavar="NAME", help="the model, when the source does not say")
    parser.add_argument("--out", metavar="FILE", help="write the configuration to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE when it exists")
    parser.add_argument("--base", metavar="DIR", help="where relative paths of the source start; here by default")
    parser.add_argument("--json", action="store_true", help="print report and configuration as JSON")


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    from tuner.core.atomic import write_text
    from tuner.core.importing.write import config_text, relocated

    base = Path(arguments.base or ".").absolute()
    target = Path(arguments.out) if arguments.out else None
    if target is not None and target.exists() and not arguments.overwrite:
        raise UsageError("this file exists", where=str(target), fix="choose another name, or add --overwrite")
    result = _import(arguments, catalog, base)
    if target is not None:
        result = relocated(result, base, target.absolute().parent)
        write_text(target, config_text(result))
    if arguments.json:
        out_json(result.as_dict() | {"path": None if target is None else str(target)})
        return result.exit_code
    report(result)
    if target is None:
        heading("configuration")
        out(config_text(result).rstrip())
    else:
        out(f"\nwrote {target}")
        out(f"next: tuner check {target}")
    return result.exit_code


def report(result: Imported) -> None:
    """Every option under the heading of what became of it."""
    from tuner.core.importing.report import TITLES

    for status, title in TITLES.items():
        rows = [row for row in result.rows if row.status == status]
        if rows:
            heading(f"{title} ({len(rows)})")
            for row in rows:
                out(f"  {row.line()}")
    table(("what became of it", "options"), [(TITLES[status], count) for status, count in result.counts.items()])
    out(f"{result.options} options in the source")
    for text in result.open:
        warn(f"still to do: {text}")
    if result.exit_code:
        warn("some options are not in the result: see not built, not accepted and unknown above")


def _import(arguments: argparse.Namespace, catalog: Catalog, base: Path) -> Imported:
    from tuner.core.importing import sd_scripts

    source: list[str] = arguments.source
    if arguments.tool == "simpletuner":
        from tuner.core.importing import simpletuner

        if len(source) > 1:
            raise UsageError("one folder or file at a time", fix="name the folder of config.json")
        return simpletuner.import_path(Path(source[0]), catalog, model=arguments.model, base=base)
    if any(word.startswith("-") or word.endswith(".py") for word in source):
        return sd_scripts.import_words(source, catalog, model=arguments.model, base=base)
    return sd_scripts.import_files([Path(each) for each in source], catalog, model=arguments.model, base=base)
