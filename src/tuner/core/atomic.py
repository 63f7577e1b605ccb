"""Writing files so that a crash leaves the old file or the new one, never a half."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)
"""What file systems without fsync for folders answer: network shares, folders of a host system."""


@contextmanager
def atomic_path(path: Path, *, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block succeeds it is fsynced and renamed over ``path``.

    mode: permissions of the finished file, those of any new file when left out. When the block raises, the temporary
    file is removed and ``path`` is as before. OSErrors pass through.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a finished one gets the mode that open() would have given it.
        # File systems without modes, such as those of memory sticks, refuse; there the file is public anyway.
        with suppress(PermissionError):
            temporary.chmod(0o666 & ~_umask() if mode is None else mode)
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Put ``text`` in place of what the file held, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Put ``data`` in place of what the file held. mode: its permissions, as `atomic_path` takes them."""
    with atomic_path(path, mode=mode) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Put ``value`` in place of what the file held, as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames inside ``path`` durable, where the system can do that for a folder."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    # Reading the mask means setting it: there is no other portable way, and this runs for an instant.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
