"""The promise that nothing is removed from a cache folder while a run uses it.

An operating-system lock, released by the kernel however a process dies: shared by the runs, held alone by what removes.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tuner.core.errors import UsageError

IN_USE = ".in-use"
"""The locked file of a cache folder; it is empty."""
_BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_ALL = 2**31 - 1


@contextmanager
def cache_in_use(folder: Path) -> Iterator[None]:
    """Inside, nothing of the folder is removed. Where it cannot be written, nobody can remove anything anyway."""
    try:
        file = (folder / IN_USE).open("a+b")
    except OSError:
        yield
        return
    with file:
        try:
            _share(file)
        except OSError as error:
            if error.errno in _BUSY:
                raise UsageError(
                    "entries are being removed from this cache", where=str(folder), fix="wait for it, then start again"
                ) from error
        yield


@contextmanager
def cache_alone(folder: Path) -> Iterator[None]:
    """Inside, no run begins to use the folder. UsageError when one uses it now."""
    try:
        file = (folder / IN_USE).open("a+b")
    except OSError as error:
        raise UsageError("this cache cannot be written", where=str(folder), why=error.strerror) from error
    with file:
        try:
            _take(file)
        except OSError as error:
            if error.errno in _BUSY:
                raise UsageError(
                    "a run is using this cache",
                    where=str(folder),
                    why="it would have to encode again what is removed",
                    fix="wait until it has ended",
                ) from error
        yield


def _share(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        # A byte per process; whoever wants to be alone needs all of them.
        file.seek(os.getpid())
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_SH)


def _take(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, _ALL)
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
