"""Compare every way of saving time or memory that CONFIG uses with plain execution, on this machine."""

from __future__ import annotations

import argparse

from tuner.cli.console import out, out_json, result_alone, table
from tuner.cli.settings import add_config_arguments, load_valid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(command="verify")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.registry import Catalog

    raw = load_valid(arguments, Catalog())
    from tuner.core.train.logs import set_up_logging
    from tuner.core.train.verify import verify

    set_up_logging(raw)
    with result_alone(arguments.json):
        found = verify(raw)
    if arguments.json:
        out_json(found.as_dict())
        return 0 if found.ok else 1
    out(f"{found.batches} batches on {found.device}; plain execution took {found.plain_seconds:.2f} s")
    rounding = ("rounding of the input", f"{found.floor[0]:.1e}", f"{found.floor[1]:.1e}", "", "", "")
    table(
        ("against plain execution", "loss", "gradient", "allowed", "seconds", ""),
        [
            rounding,
            *(
                (
                    row.name,
                    f"{row.loss:.1e}",
                    f"{row.gradient:.1e}",
                    f"{row.allowed[0]:.1e}, {row.allowed[1]:.1e}",
                    f"{row.seconds:.2f}",
                    "ok" if row.ok else "DIFFERS",
                )
                for row in found.rows
            ),
        ],
    )
    if not found.ok:
        out("what differs computes another step here: take it out of the configuration, and please report it")
    return 0 if found.ok else 1
