"""The content-addressed store of encodings: one file per entry, named by everything that made it.

An entry is a safetensors file ``aa/bb/<key>.safetensors``. Its header holds the ingredients of the key and a CRC-32 of
the whole file (computed with the checksum's own digits set to zero), which is verified at every read. A write goes to
a temporary name, is flushed to the disk and renamed, so a killed process leaves a complete entry or none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from tuner.core.atomic import atomic_path
from tuner.core.errors import UsageError

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
"""Part of every key: raised when the meaning of an entry changes."""

_CHECKSUM = b'"checksum":"crc32-'
_DIGITS = 8
_LEFTOVER_AGE_S = 24 * 3600
_NAME = re.compile(r"[0-9a-f]{32}")
_LEFTOVER = re.compile(r"\.([0-9a-f]{32})\.safetensors\.\w+\.tmp")
_LONGEST_HEADER = 1 << 20


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Names an entry. ``kind`` is ``latents``, ``mask`` or ``text``; ``ingredients`` are JSON values."""

    kind: str
    ingredients: Mapping[str, Any]
    name: str

    @classmethod
    def of(cls, kind: str, ingredients: Mapping[str, Any]) -> CacheKey:
        full = {"kind": kind, "format": CACHE_FORMAT, **ingredients}
        canonical = json.dumps(full, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return cls(kind, full, hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest())


class Store(Protocol):
    """What the encoders and the loader need of a cache."""

    def has(self, key: CacheKey) -> bool: ...

    def get(self, key: CacheKey) -> dict[str, Tensor] | None: ...

    def put(self, key: CacheKey, tensors: Mapping[str, Tensor]) -> None: ...


class MemoryStore:
    """Entries of one run in host memory (``cache.latents`` or ``cache.text`` = ``memory``)."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Tensor]] = {}

    def has(self, key: CacheKey) -> bool:
        return key.name in self._entries

    def get(self, key: CacheKey) -> dict[str, Tensor] | None:
        entry = self._entries.get(key.name)
        # A new dict each time: a caller that swaps a tensor must not change the entry.
        return None if entry is None else dict(entry)

    def put(self, key: CacheKey, tensors: Mapping[str, Tensor]) -> None:
        self._entries[key.name] = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


class CacheStore:
    """Entries on disk under ``root``; safe for several processes that write the same entry."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, key: CacheKey | str) -> Path:
        name = key if isinstance(key, str) else key.name
        return self.root / name[:2] / name[2:4] / f"{name}.safetensors"

    def has(self, key: CacheKey) -> bool:
        """Whether the entry exists: one stat. Its content is verified when it is read."""
        return self.path(key).is_file()

    def get(self, key: CacheKey) -> dict[str, Tensor] | None:
        """The entry's tensors, or None when it is absent or broken; a broken one is named in a warning."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        problem = _problem(data, key.name)
        if problem is None:
            try:
                tensors: dict[str, Tensor] = load_safetensors(data)
                return tensors
            except (SafetensorError, ValueError, KeyError) as error:
                problem = str(error)
        logger.warning("cache entry %s is broken (%s) and will be made again", path, problem)
        return None

    def put(self, key: CacheKey, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry; replaces a broken one. Raises UsageError when the disk is full or not writable."""
        path = self.path(key)
        data = _seal(key, tensors)
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
                raise UsageError(
                    "the cache cannot be written",
                    where=str(self.root),
                    why=error.strerror,
                    fix="free some space, or point cache.dir at another disk; what is cached already is kept",
                ) from error
            raise

    def names(self) -> Iterator[str]:
        """Names of all entries. A file that is not where an entry of its name would be is none of ours, nor is one that
        a link leads to, nor a sound file that does not say what it was made from."""
        for path in sorted(self.root.glob("??/??/*.safetensors")):
            at_home = _NAME.fullmatch(path.stem) and path == self.path(path.stem)
            if at_home and self._is_own(path) and not _is_foreign(path):
                yield path.stem

    def _is_own(self, path: Path) -> bool:
        """Whether a path is a file of this folder itself, with no link on the way."""
        linked = any(each.is_symlink() for each in (path, path.parent, path.parent.parent))
        return not linked and path.is_file()

    def broken(self, on_progress: Callable[[int], None] | None = None) -> Iterator[Path]:
        """Entries whose content does not match their checksum; on_progress is called with 1 after each entry."""
        for name in self.names():
            path = self.path(name)
            if _problem(path.read_bytes(), name) is not None:
                yield path
            if on_progress is not None:
                on_progress(1)

    def described(self, name: str) -> dict[str, Any]:
        """What an entry was made from, read from its header alone; nothing for one that has none."""
        try:
            with self.path(name).open("rb") as file:
                start = file.read(8)
                loaded = json.loads(json.loads(_metadata(start + file.read(_length(start)))["tuner"])["ingredients"])
        except (OSError, ValueError, KeyError, TypeError, AssertionError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def leftovers(self) -> list[Path]:
        """What killed writers left; what was written in the last day may still be in work."""
        newest = time.time() - _LEFTOVER_AGE_S
        return [
            path
            for path in sorted(self.root.glob("??/??/.*.tmp"))
            if (match := _LEFTOVER.fullmatch(path.name))
            and path.parent == self.path(match[1]).parent
            and self._is_own(path)
            and path.stat().st_mtime < newest
        ]

    def ingredients(self, name: str) -> dict[str, Any]:
        """What an entry was made from, as its header says; raises UsageError for a broken entry."""
        data = self.path(name).read_bytes()
        if (problem := _problem(data, name)) is not None:
            raise UsageError("broken cache entry", where=str(self.path(name)), why=problem)
        loaded = json.loads(json.loads(_metadata(data)["tuner"])["ingredients"])
        assert isinstance(loaded, dict)
        return loaded

    def prune(self, keep: Collection[str], *, dry_run: bool = False) -> list[Path]:
        """Remove entries whose name is not in ``keep`` and what killed writers left; returns the paths."""
        wanted = set(keep)
        doomed = [self.path(name) for name in self.names() if name not in wanted] + self.leftovers()
        if not dry_run:
            for path in doomed:
                path.unlink(missing_ok=True)
        return doomed


def open_store(mode: str, root: Path) -> Store | None:
    """The store for ``cache.latents`` or ``cache.text``: None for ``off``."""
    if mode == "off":
        return None
    return MemoryStore() if mode == "memory" else CacheStore(root)


def _seal(key: CacheKey, tensors: Mapping[str, Tensor]) -> bytes:
    record = json.dumps(
        {"checksum": "crc32-" + "0" * _DIGITS, "key": key.name, "ingredients": json.dumps(key.ingredients)},
        separators=(",", ":"),
    )
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = bytearray(dump_safetensors(plain, metadata={"tuner": record}))
    at = _checksum_at(data)
    assert at is not None
    data[at : at + _DIGITS] = b"%08x" % zlib.crc32(data)
    return bytes(data)


def _problem(data: bytes, name: str) -> str | None:
    """What is wrong with a file's bytes, or None."""
    at = _checksum_at(data)
    if at is None:
        return "truncated or without a checksum"
    stated = data[at : at + _DIGITS]
    crc = zlib.crc32(data[:at])
    crc = zlib.crc32(b"0" * _DIGITS, crc)
    crc = zlib.crc32(memoryview(data)[at + _DIGITS :], crc)
    if stated != b"%08x" % crc:
        return "checksum mismatch"
    if json.loads(_metadata(data)["tuner"])["key"] != name:
        return "the entry belongs to another name"
    return None


def _checksum_at(data: bytes | bytearray) -> int | None:
    """Offset of the checksum's digits inside the header. The header is JSON inside JSON, so quotes are escaped."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        return None
    needle = _CHECKSUM.replace(b'"', b'\\"')
    at = data.find(needle, 8, 8 + length)
    return None if at < 0 else at + len(needle)


def _is_foreign(path: Path) -> bool:
    """Whether a file is sound as far as its header goes, and of another program. A torn one counts as ours."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            header = json.loads(file.read(_length(start)))
    except (OSError, ValueError):
        return False
    return isinstance(header, dict) and "tuner" not in (header.get("__metadata__") or ())


def _length(data: bytes) -> int:
    """Bytes of the header, as the first eight say; none where that cannot be."""
    length = int.from_bytes(data[:8], "little")
    return length if length < _LONGEST_HEADER else 0


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert isinstance(metadata, dict)
    return metadata
