"""The only place of the wizard that writes."""

from __future__ import annotations

import stat

from tuner.core.atomic import write_bytes
from tuner.core.config.edit import unified_diff
from tuner.core.errors import UsageError
from tuner.core.wizard.builder import Outcome


def difference(outcome: Outcome) -> str:
    """What changes in an existing file."""
    return unified_diff(outcome.before or "", outcome.text, outcome.path.name)


def write(outcome: Outcome) -> None:
    """Write the file: a new one only where there is none, an old one only while it is as it was read."""
    path, data = outcome.path, outcome.text.encode()
    try:
        if outcome.before is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(data)
        elif path.read_bytes() != outcome.before.encode():
            raise UsageError("the file has changed meanwhile", where=str(path), why="somebody else wrote it",
                             fix="start again")  # fmt: skip
        else:
            write_bytes(path.resolve(), data, mode=stat.S_IMODE(path.stat().st_mode))
    except FileExistsError as error:
        raise UsageError("this file exists meanwhile", where=str(path), fix="choose another name") from error
    except OSError as error:
        raise UsageError("cannot write the configuration", where=str(path), why=error.strerror) from error
