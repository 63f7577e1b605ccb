"""Locks of the operating system on open files: the kernel releases them however a process dies."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import IO, Any

_BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_ALL = 2**31 - 1


def take(file: IO[Any]) -> bool:
    """Lock a file for this process alone. False when another one holds it; where there are no locks, as in some network
    folders, True."""
    return _succeeds(_take, file)


def share(file: IO[Any]) -> bool:
    """Lock a file together with others that share it, as `take` does; waits for who holds it alone."""
    return _succeeds(_share, file)


def _succeeds(lock: Callable[[IO[Any]], None], file: IO[Any]) -> bool:
    try:
        lock(file)
    except OSError as error:
        return error.errno not in _BUSY
    return True


def _share(file: IO[Any]) -> None:
    if sys.platform == "win32":
        import msvcrt

        # A byte per process; whoever wants to be alone needs all of them.
        file.seek(os.getpid())
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_SH)


def _take(file: IO[Any]) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, _ALL)
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
