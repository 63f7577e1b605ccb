"""The stored index of one source: what is known about each file, as long as its size and time stay the same."""

from __future__ import annotations

import hashlib
import logging
import re
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tuner.core.data.probe import Probe

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised when a stored index must not be read by this program any more; it is then made anew."""

_SETTLED_NS = 2_000_000_000
"""A file changed this shortly before it was read may change again within the resolution of its time stamp."""

_CREATE = """CREATE TABLE IF NOT EXISTS files (
    key TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, read_ns INTEGER,
    digest TEXT, width INTEGER, height INTEGER, mode TEXT, orientation INTEGER, alpha INTEGER, decoded INTEGER)"""
_SELECT = "SELECT key, size, mtime_ns, read_ns, digest, width, height, mode, orientation, alpha, decoded FROM files"
_REPLACE = "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class Stored:
    """A file as it was when it was read."""

    size: int
    mtime_ns: int
    read_ns: int
    probe: Probe

    def trusted(self, size: int, mtime_ns: int) -> bool:
        """Whether a file of this size and time is surely the one that was read."""
        return (size, mtime_ns) == (self.size, self.mtime_ns) and mtime_ns + _SETTLED_NS < self.read_ns


class IndexStore:
    """One SQLite file. Several processes may use it at once; a damaged file is made anew, since it can be."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, Stored]:
        """Everything that is stored, by key."""
        if not self.path.exists():
            return {}
        try:
            with closing(self._connect()) as db:
                rows = db.execute(_SELECT).fetchall()
        except sqlite3.OperationalError as error:
            log.warning("the index %s cannot be read (%s): all files are read again", self.path, error)
            return {}
        except sqlite3.DatabaseError as error:
            log.warning("the index %s is damaged (%s) and is made anew", self.path, error)
            self.path.unlink(missing_ok=True)
            return {}
        return {row[0]: _stored(row) for row in rows}

    def update(self, changed: Mapping[str, tuple[int, int, Probe]], gone: Iterable[str] = ()) -> None:
        """Store files that were read just now, as key -> (size, mtime_ns, probe), and forget others.

        Only usable files are worth storing: a newer Pillow may read what this one cannot.
        """
        gone = list(gone)
        if not changed and not gone:
            return
        now = time.time_ns()
        rows = [_row(key, size, mtime_ns, now, probe) for key, (size, mtime_ns, probe) in changed.items()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as db, db:
                db.execute("BEGIN IMMEDIATE")
                db.executemany(_REPLACE, rows)
                db.executemany("DELETE FROM files WHERE key = ?", [(key,) for key in gone])
        except (OSError, sqlite3.Error) as error:
            log.warning("the index %s cannot be written (%s): the next start reads all files again", self.path, error)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=60)
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT):
                db.execute("DROP TABLE IF EXISTS files")
            db.execute(_CREATE)
            db.execute(f"PRAGMA user_version = {FORMAT}")
            db.commit()
        except sqlite3.Error:
            db.close()
            raise
        return db


def index_path(cache_dir: Path, source: str, root: Path) -> Path:
    """Where the index of a source lies: readable by its name, unique by its folder."""
    place = hashlib.blake2b(str(root.absolute()).encode(), digest_size=6).hexdigest()
    return cache_dir / "index" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', source)[:60]}-{place}.sqlite"


def _row(key: str, size: int, mtime_ns: int, read_ns: int, probe: Probe) -> tuple[object, ...]:
    found = (
        probe.digest,
        probe.width,
        probe.height,
        probe.mode,
        probe.orientation,
        int(probe.alpha),
        int(probe.decoded),
    )
    return key, size, mtime_ns, read_ns, *found


def _stored(row: tuple[object, ...]) -> Stored:
    _, size, mtime_ns, read_ns, digest, width, height, mode, orientation, alpha, decoded = row
    probe = Probe(
        digest=str(digest),
        width=_int(width),
        height=_int(height),
        mode=str(mode),
        orientation=_int(orientation),
        alpha=bool(alpha),
        decoded=bool(decoded),
    )
    return Stored(_int(size), _int(mtime_ns), _int(read_ns), probe)


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0
