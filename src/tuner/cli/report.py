"""Show what runs came to: one run as a page of its own, several side by side with the settings that differ."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tuner.cli.console import heading, out, out_json, table
from tuner.core.errors import UsageError

WIDEST = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders: what checkpoint.dir names")
    parser.add_argument("--out", metavar="FILE", help="several runs: write the comparison with charts as one HTML page")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.track.compare import compare_runs, write_comparison
    from tuner.core.track.report import write_report

    folders = [Path(each) for each in arguments.runs]
    single = len(folders) == 1
    if single and arguments.out is not None:
        raise UsageError("--out is for several runs", why="the page of one run lies in its folder")
    comparison = compare_runs(folders)
    page = Path(arguments.out) if arguments.out else None
    if single:
        page = write_report(folders[0])
    elif page is not None:
        write_comparison(comparison, page)
    if arguments.json:
        out_json(comparison.as_dict() | {"page": None if page is None else str(page)})
        return 0
    table(*comparison.table())
    names = [row.run for row in comparison.rows]
    for title, values in (("settings", comparison.settings), ("versions", comparison.versions)):
        if values:
            heading(f"\n{title} that differ")
            table(["", *names], [[key, *map(_short, row)] for key, row in values.items()])
    if page is not None:
        out(f"\npage: {page}")
    elif not single:
        out("\nwith charts as one page: --out FILE.html")
    return 0


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
