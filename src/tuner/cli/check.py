"""Check configuration, weight files, images, captions and disk space; everything wrong is listed at once."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import TYPE_CHECKING

from tuner.cli.console import heading, out, out_json, table, warn
from tuner.cli.settings import add_config_arguments, load, same_settings
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.config import RawConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(command="check")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.registry import Catalog

    code = report(load(arguments, Catalog()), as_json=arguments.json)
    if code == 0 and not arguments.json:
        out(f"next: {same_settings(arguments, 'train')}")
    return code


def report(raw: RawConfig, *, as_json: bool, resuming: bool = False) -> int:
    """Print what the check found; problems are raised."""
    from rich.console import Console

    from tuner.core.track.progress import Progress
    from tuner.core.train.check import check

    console = Console(stderr=True)
    try:
        # Not as lines in a log: there the problems alone are of interest.
        with Progress("pictures", None, "files", console=console) if console.is_terminal else nullcontext() as progress:
            found = check(raw, resuming=resuming, on_progress=None if progress is None else progress.advance_of)
    except UsageError as problem:
        if as_json:
            out_json({"ok": False, "problems": [_fields(each) for each in problem.parts or (problem,)]})
            return problem.exit_code
        raise
    if as_json:
        out_json({"ok": True} | found.as_dict())
        return 0
    plan = found.plan
    heading("files")
    for name, text in found.files.items():
        out(f"  {name}: {text}")
    if found.adapter:
        heading("adapter")
    for line in found.adapter:
        out(f"  {line}")
    heading("data")
    table(
        ("source", "role", "images", "per epoch", "held out"),
        [(row.source, row.role, row.images, row.visits, row.held_out) for row in plan.sources],
    )
    table(("size", "images", "per epoch", "batches"), [(r.bucket, r.images, r.visits, r.batches) for r in plan.buckets])
    for line in plan.left_out_lines():
        warn(line)
    out(f"{plan.steps_per_epoch} steps per epoch, {plan.total_steps} in all; {plan.cropped:.1%} of the pixels cropped")
    heading("disk")
    for name, text in found.disk.items():
        out(f"  {name}: {text}")
    for note in (*plan.notes, *found.warnings):
        warn(note)
    out("no problems found")
    return 0


def _fields(problem: UsageError) -> dict[str, str | None]:
    return {"what": problem.what, "where": problem.where, "why": problem.why, "fix": problem.fix}
