"""Looking after a cache folder: what is in it, whether it is sound, and what nobody needs any more.

Only files that the cache itself makes are ever counted as its own: entries under their names, the indices of sources,
and the remembered hashes. Anything else in the folder is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tuner.core.data.cache import CacheStore
from tuner.core.data.inuse import IN_USE, cache_alone
from tuner.core.data.keys import HASHES, FileHashes
from tuner.core.errors import NotHereError


@dataclass(frozen=True, slots=True, kw_only=True)
class KindRow:
    """Entries of one kind and model. used: those that the named configurations read; None where none was named."""

    kind: str
    model: str
    entries: int
    bytes: int
    used: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInfo:
    """What a cache folder holds. indices: stored indices of sources. leftovers: of killed writers. others: files in the
    folder that are none of ours."""

    folder: Path
    rows: tuple[KindRow, ...]
    indices: int
    index_bytes: int
    leftovers: int
    others: int

    @property
    def entries(self) -> int:
        return sum(row.entries for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"folder": str(self.folder), "entries": self.entries, "bytes": self.bytes}


@dataclass(kw_only=True)
class CacheCheck:
    """broken: entries whose checksum does not match. changed: weight files that are not what they were hashed as."""

    folder: Path
    entries: int
    broken: list[Path] = field(default_factory=list)
    changed: list[Path] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.broken and not self.changed

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "ok": self.ok, "folder": str(self.folder), "entries": self.entries,
            "broken": [str(path) for path in self.broken], "changed": [str(path) for path in self.changed],
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Doomed:
    """Files that may go: entries that nobody named reads, broken entries, leftovers."""

    folder: Path
    unused: tuple[Path, ...]
    broken: tuple[Path, ...]
    leftovers: tuple[Path, ...]
    kept: int

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.unused, *self.broken, *self.leftovers)

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files if path.is_file())

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        named = {name: [str(path) for path in getattr(self, name)] for name in ("unused", "broken", "leftovers")}
        return {"folder": str(self.folder), "kept": self.kept, "bytes": self.bytes, **named}


def cache_info(folder: Path, used: Collection[str] | None = None) -> CacheInfo:
    """Count what a folder holds, by kind and model. used: names of entries that are needed; None when not known."""
    store = _open(folder)
    found: dict[tuple[str, str], list[int]] = {}
    for name in store.names():
        entry = store.described(name)
        row = found.setdefault((str(entry.get("kind", "unreadable")), _model_of(entry)), [0, 0, 0])
        row[0] += 1
        row[1] += store.path(name).stat().st_size
        row[2] += used is not None and name in used
    indices = sorted((folder / "index").glob("*.sqlite"))
    leftovers = store.leftovers()
    files = sum(path.is_file() for path in folder.rglob("*"))
    kept = sum((folder / name).is_file() for name in (HASHES, IN_USE))
    ours = sum(row[0] for row in found.values()) + len(indices) + len(leftovers) + kept
    return CacheInfo(
        folder=folder,
        rows=tuple(
            KindRow(kind=kind, model=model, entries=row[0], bytes=row[1], used=None if used is None else row[2])
            for (kind, model), row in sorted(found.items())
        ),
        indices=len(indices),
        index_bytes=sum(path.stat().st_size for path in indices),
        leftovers=len(leftovers),
        others=files - ours,
    )


def verify_cache(folder: Path, on_progress: Callable[[int, int], None] | None = None) -> CacheCheck:
    """Read every entry and every remembered weight file again. Wrong hashes of weight files are forgotten.

    on_progress: called with (entries that were just read, all). Raises NotHereError when there is no such folder.
    """
    store = _open(folder)
    count = sum(1 for _ in store.names())
    tick = None if on_progress is None else (lambda done: on_progress(done, count))
    broken = list(store.broken(tick))
    return CacheCheck(folder=folder, entries=count, broken=broken, changed=FileHashes(folder / HASHES).changed())


def doomed_files(folder: Path, used: Collection[str], on_progress: Callable[[int, int], None] | None = None) -> Doomed:
    """What can be removed when only the entries ``used`` are needed; nothing is removed here.

    on_progress: called with (entries that were just read, all).
    """
    store = _open(folder)
    count = sum(1 for _ in store.names())
    tick = None if on_progress is None else (lambda done: on_progress(done, count))
    leftovers = store.leftovers()
    unused = [path for path in store.prune(used, dry_run=True) if path not in leftovers]
    gone = set(unused)
    broken = [path for path in store.broken(tick) if path not in gone]
    kept = count - len(unused) - len(broken)
    return Doomed(
        folder=folder, unused=tuple(unused), broken=tuple(broken), leftovers=tuple(leftovers), kept=kept
    )  # fmt: skip


def remove(doomed: Doomed) -> None:
    """Remove the files, and their folders where these are empty then. UsageError when a run uses the cache."""
    with cache_alone(doomed.folder):
        for path in doomed.files:
            path.unlink(missing_ok=True)
        inner = {path.parent for path in doomed.files}
        for folder in [*inner, *{path.parent for path in inner}]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _open(folder: Path) -> CacheStore:
    if not folder.is_dir():
        raise NotHereError("there is no cache here", where=str(folder), fix="tuner cache config.json makes one")
    return CacheStore(folder)


def _model_of(entry: dict[str, Any]) -> str:
    maker = entry.get("vae") or entry.get("encoders") or {}
    return str(maker.get("family", "")) if isinstance(maker, dict) else ""
