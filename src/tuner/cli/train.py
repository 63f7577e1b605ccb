"""Train an adapter with the settings of CONFIG."""

from __future__ import annotations

import argparse

from tuner.cli.console import out
from tuner.cli.settings import add_config_arguments, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint of the run folder, or from this one",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and plan, then stop: as 'tuner check'")
    parser.set_defaults(command="train", json=False)


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.registry import Catalog

    raw = load(arguments, Catalog())
    if arguments.dry_run:
        from tuner.cli.check import report

        return report(raw, as_json=False, resuming=arguments.resume is not None)
    from tuner.core.train.logs import set_up_logging
    from tuner.core.train.run import train

    set_up_logging(raw)

    summary = train(raw, resume=arguments.resume)
    done = "finished" if summary.reason == "finished" else f"{summary.reason}, to go on add --resume"
    out(f"{done}: step {summary.steps}, {summary.seconds:.0f} s, {summary.folder}")
    for path in summary.files:
        out(f"adapter: {path}")
    return 0
