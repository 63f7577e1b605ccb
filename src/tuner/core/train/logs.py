"""Where the program's messages go: standard error, and the file that ``log.file`` names."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tuner.core.errors import UsageError


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what standard error is now: a live progress bar puts itself in its place to keep lines apart."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class Labelled(logging.Formatter):
    """The message alone; ``warning: `` or ``error: `` goes before what asks for attention."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def set_up_logging(raw: Mapping[str, Any]) -> None:
    """Show messages from ``log.level`` on. ``raw`` may be unchecked: what is wrong in it is reported later.

    Only this program's logger is touched, so other libraries keep their own settings. Calling it again replaces the
    handlers of the call before.
    """
    section = raw.get("log")
    section = section if isinstance(section, Mapping) else {}
    handlers: list[logging.Handler] = [StderrHandler()]
    file = section.get("file")
    if isinstance(file, str):
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(file, encoding="utf-8"))
        except OSError as error:
            raise UsageError("cannot write the log file", where=f"{file}, log.file", why=error.strerror) from error
    logger = logging.getLogger("tuner")
    level = str(section.get("level", "info")).upper()
    logger.setLevel(level if level in LEVELS else "INFO")
    for old in logger.handlers:
        old.close()
    logger.handlers[:] = handlers
    logger.propagate = False
    for handler in handlers:
        handler.setFormatter(Labelled("%(message)s"))
