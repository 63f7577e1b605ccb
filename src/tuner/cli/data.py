"""Look at the pictures and captions of a configuration, before any training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.cli.console import error, heading, out, out_json, table, warn
from tuner.cli.settings import add_config_arguments, load, same_settings

if TYPE_CHECKING:
    from tuner.core.data.tags import CaptionReport
    from tuner.core.train.survey import Survey

SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser(
        "inspect", help="buckets, crops, captions, duplicates, and pictures that are small, blurred or odd"
    )
    add_config_arguments(inspect)
    inspect.add_argument("--sheet", metavar="DIR", help="write contact sheets of every bucket into this folder")
    inspect.add_argument("--all", action="store_true", help=f"list every picture instead of the first {SHOWN}")
    inspect.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(command="data inspect")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.registry import Catalog, open_known, typed_config

    catalog = Catalog()
    raw = load(arguments, catalog)
    config, facts, _ = open_known(typed_config(raw, catalog), catalog, raw)
    from rich.console import Console

    from tuner.core.data.sheets import write_sheets
    from tuner.core.track.progress import Progress
    from tuner.core.train.survey import survey

    console = Console(stderr=True)  # the result alone is standard output
    with Progress("pictures", None, "images", plain=config.log.plain, console=console) as progress:
        found = survey(config, facts, catalog, progress.advance_of)
    sheets: list[Path] = []
    if arguments.sheet is not None and found.layout is not None:
        sheets = write_sheets(found.layout, Path(arguments.sheet))
    if arguments.json:
        out_json(found.as_dict() | {"sheets": [str(path) for path in sheets]})
    else:
        _show(found, None if arguments.all else SHOWN)
        for path in sheets:
            out(f"sheet: {path}")
        if not found.problems:
            out(f"next: {same_settings(arguments, 'check')}")
    return 2 if found.problems else 0


def _show(found: Survey, shown: int | None) -> None:
    heading("sources")
    table(
        ("source", "images", "smallest", "largest", "without caption"),
        [
            (each.source, each.images, _size(each.smallest), _size(each.largest), len(each.without_caption))
            for each in found.data.sources
        ],
    )
    if found.plan is not None:
        heading("\nbuckets")
        rows = [
            (row.tier, row.bucket, row.images, row.visits, row.batches, f"{row.cropped:.1%}", row.enlarged)
            for row in found.plan.buckets
        ]
        table(("resolution", "bucket", "images", "per epoch", "batches", "cropped", "enlarged"), rows)
        for line in found.plan.left_out_lines():
            warn(line)
    heading("\ncaptions")
    for report in found.captions:
        _show_captions(report)
    for name, (limit, longest, above) in found.tokens.items():
        out(f"  {name} tokens: at most {longest} of {limit}" + (f"; {above} captions are cut" if above else ""))
    _show_pictures(found, shown)
    for line in (*found.data.warnings(), *(found.plan.notes if found.plan else ()), *found.notes):
        warn(line)
    for problem in found.problems:
        error(str(problem))
    if found.layout is None:
        warn("buckets and contact sheets come once these problems are solved")
    if not found.problems:
        out("\nno problems found")


def _show_captions(report: CaptionReport) -> None:
    longest = f", the longest {report.longest[0]} ({report.longest[1]})" if report.longest else ""
    out(f"  {report.source}: {report.texts} different, {report.mean_length:.0f} characters on average{longest}")
    if report.tags:
        out(f"    most common of {report.distinct_tags}: " + ", ".join(f"{tag} {count}" for tag, count in report.tags))
    if report.shared:
        out(f"    in all: {', '.join(report.shared)}")


def _show_pictures(found: Survey, shown: int | None) -> None:
    from tuner.core.train.survey import KINDS

    for kind, remarks in found.remarks.items():
        heading(f"\n{len(remarks)} {'picture' if len(remarks) == 1 else 'pictures'}: {KINDS[kind]}")
        for remark in remarks[:shown]:
            out(f"  {remark.image}: {remark.detail}")
        _more(len(remarks), shown)
    if found.alike:
        groups = "group" if len(found.alike) == 1 else "groups"
        heading(f"\n{len(found.alike)} {groups} of pictures that look alike")
        for group in found.alike[:shown]:
            out(f"  {', '.join(group)}")
        _more(len(found.alike), shown)


def _more(count: int, shown: int | None) -> None:
    if shown is not None and count > shown:
        out(f"  and {count - shown} more: --all")


def _size(size: tuple[int, int] | None) -> str:
    return "-" if size is None else f"{size[0]}x{size[1]}"
