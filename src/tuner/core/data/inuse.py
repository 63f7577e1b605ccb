"""The promise that nothing is removed from a cache folder while a run uses it: shared by the runs, held alone by what
removes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tuner.core.errors import UsageError
from tuner.core.locks import share, take

IN_USE = ".in-use"
"""The locked file of a cache folder; it is empty."""


@contextmanager
def cache_in_use(folder: Path) -> Iterator[None]:
    """Inside, nothing of the folder is removed. Where no file can be made, nobody can remove anything either."""
    try:
        file = _opened(folder / IN_USE)
    except OSError:
        yield
        return
    with file:
        if not share(file):
            raise UsageError(
                "entries are being removed from this cache", where=str(folder), fix="wait for it, then start again"
            )
        yield


@contextmanager
def cache_alone(folder: Path) -> Iterator[None]:
    """Inside, no run begins to use the folder. UsageError when one uses it now."""
    try:
        file = _opened(folder / IN_USE)
    except OSError as error:
        raise UsageError("this cache cannot be written", where=str(folder), why=error.strerror) from error
    with file:
        if not take(file):
            raise UsageError(
                "a run is using this cache",
                where=str(folder),
                why="it would have to encode again what is removed",
                fix="wait until it has ended",
            )
        yield


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("a+b")
    except PermissionError:
        # Somebody else who shares the folder made it; for a lock it is enough to read it.
        return path.open("rb")
