"""Write CONFIG by answering questions about your model, your pictures and your graphics card.

An existing CONFIG is changed: comments and order stay, and the difference is shown before anything is written."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from tuner.cli.console import heading, out, out_json
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.wizard.builder import Outcome
    from tuner.core.wizard.questions import Interview


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="the file to write, or to change when it exists")
    parser.add_argument("--answers", metavar="FILE", help="take answers from a JSON file: question to answer")
    parser.add_argument("--json", action="store_true", help="print the result as JSON; goes with --answers")


def run(arguments: argparse.Namespace) -> int:
    from tuner.cli.askers import open_asker
    from tuner.core.registry import Catalog
    from tuner.core.wizard.change import configure_existing
    from tuner.core.wizard.create import configure_new
    from tuner.core.wizard.questions import Interview

    if arguments.json and not arguments.answers:
        raise UsageError("--json goes with --answers", why="questions and their answers are not JSON")
    answers = Path(arguments.answers) if arguments.answers else None
    interview = Interview(open_asker(answers, quiet=arguments.json))
    target = Path(arguments.config).expanduser() if arguments.config else None
    catalog = Catalog()
    with tempfile.TemporaryDirectory(prefix="tuner-configure-") as scratch:
        if _exists(target):
            outcome = configure_existing(interview, catalog, target, Path(scratch))
        else:
            outcome = configure_new(interview, catalog, target, Path(scratch))
    return finish(interview, outcome) if not arguments.json else _finish_as_json(interview, outcome)


def _exists(target: Path | None) -> TypeGuard[Path]:
    try:
        return target is not None and target.exists()
    except OSError as error:
        raise UsageError("this cannot be the name of a file", where=str(target), why=error.strerror) from error


def finish(interview: Interview, outcome: Outcome) -> int:
    """Show what would be written, ask, and write."""
    from tuner.core.wizard.writing import difference, write

    if outcome.text == outcome.before:
        interview.asker.finish()
        out("nothing changes")
        return 0
    heading(f"\n{outcome.path}")
    out(outcome.text.rstrip() if outcome.before is None else difference(outcome).rstrip())
    if not _agreed(interview, outcome):
        out("nothing was written")
        return 0
    write(outcome)
    out(f"{'wrote' if outcome.before is None else 'changed'} {outcome.path}")
    place = f"{shlex.quote(str(outcome.path))}{'' if outcome.names_model else ' --model NAME'}"
    out(f"next: tuner check {place}")
    out(f"then: tuner train {place}")
    return 0


def _agreed(interview: Interview, outcome: Outcome) -> bool:
    agreed = interview.confirm(
        "write",
        "Write this file?" if outcome.before is None else "Change the file like this?",
        # A file that is there is changed only when somebody says so, a script too.
        default=True if outcome.before is None else None,
    )
    interview.asker.finish()
    return agreed


def _finish_as_json(interview: Interview, outcome: Outcome) -> int:
    from tuner.core.wizard.writing import difference, write

    changed = outcome.text != outcome.before
    written = changed and _agreed(interview, outcome)
    if not changed:
        interview.asker.finish()
    if written:
        write(outcome)
    out_json(
        {
            "path": str(outcome.path),
            "new": outcome.before is None,
            "written": written,
            "difference": None if outcome.before is None else difference(outcome),
            "answers": interview.given,
            "plan": None if outcome.plan is None else outcome.plan.as_dict(),
        }
    )
    return 0
