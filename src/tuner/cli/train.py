"""Train an adapter or a whole model with the settings of CONFIG; several configurations are trained one by one."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from tuner.cli.console import heading, out, out_json, result_alone, table
from tuner.cli.settings import add_setting_options, load, load_valid
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.config import RawConfig
    from tuner.core.train.queue import QueueRow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="JSON files; comments are allowed")
    add_setting_options(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint of the run folder, or from this one",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and plan, then stop: as 'tuner check'")
    parser.add_argument("--keep-going", action="store_true", help="several configurations: go on when one fails")
    parser.add_argument("--json", action="store_true", help="print how it ended as JSON; all else to standard error")
    parser.set_defaults(command="train")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.registry import Catalog

    if len(arguments.configs) > 1:
        return _queue(arguments)
    if arguments.keep_going:
        raise UsageError("--keep-going is for several configurations", fix="name more, or leave it out")
    arguments.config = arguments.configs[0] if arguments.configs else None
    if arguments.dry_run:
        from tuner.cli.check import report

        return report(load(arguments, Catalog()), as_json=arguments.json, resuming=arguments.resume is not None)
    return _train(load_valid(arguments, Catalog()), arguments.resume, as_json=arguments.json)


def _train(raw: RawConfig, resume: str | None, *, as_json: bool) -> int:
    from tuner.core.train.logs import set_up_logging
    from tuner.core.train.run import train

    set_up_logging(raw)

    with result_alone(as_json):
        summary = train(raw, resume=resume)
    if as_json:
        out_json(asdict(summary))
        return 0
    done = "finished" if summary.reason == "finished" else f"{summary.reason}, to go on add --resume"
    out(f"{done}: step {summary.steps}, {summary.seconds:.0f} s, {summary.folder}")
    for path in summary.files:
        out(f"wrote {path}")
    return 0


def _queue(arguments: argparse.Namespace) -> int:
    from tuner.core.registry import Catalog
    from tuner.core.train.queue import plan_queue, run_queue

    if arguments.dry_run:
        raise UsageError("--dry-run takes one configuration", fix=f"tuner check {arguments.configs[0]}")
    if arguments.resume not in (None, "auto"):
        raise UsageError("one checkpoint cannot belong to several runs", fix="write --resume after the configurations")
    catalog = Catalog()
    documents = []
    for name in arguments.configs:
        arguments.config = name
        documents.append((name, load(arguments, catalog)))
    runs = plan_queue(documents, catalog)
    options = [word for text in arguments.sets for word in ("--set", text)]
    for option in ("model", "preset"):
        if value := getattr(arguments, option):
            options += [f"--{option}", value]
    rows = []
    output = sys.stderr if arguments.json else None
    resume = arguments.resume is not None
    for row in run_queue(runs, options, keep_going=arguments.keep_going, resume=resume, output=output):
        rows.append(row)
        if row.result != "not started" and not arguments.json:
            heading(f"{len(rows)} of {len(runs)}: {row.config} {row.result}")
    return _summarise(rows, as_json=arguments.json)


def _summarise(rows: list[QueueRow], *, as_json: bool) -> int:
    """130 after an interruption, 3 when some run failed, else 0."""
    from tuner.core.track.progress import duration

    if as_json:
        out_json([row.as_dict() for row in rows])
    else:
        table(
            ("configuration", "result", "exit code", "steps", "time", "folder"),
            [
                (
                    row.config,
                    row.result,
                    "-" if row.code is None else row.code,
                    "-" if row.steps is None else row.steps,
                    duration(row.seconds),
                    row.folder,
                )
                for row in rows
            ],
        )
        if any(row.result != "finished" for row in rows):
            out("to go on with what did not finish: the same command with --resume after the configurations")
    if any(row.result == "interrupted" for row in rows):
        return 130
    return 3 if any(row.result != "finished" for row in rows) else 0
