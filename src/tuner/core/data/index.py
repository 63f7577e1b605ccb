"""The index of a source: every image with its size, content hash, caption and mask, known without its pixels.

What was learned from a file is stored under the cache folder and trusted while the file's size and time are unchanged,
so that a later start costs one ``stat`` per image. Nothing is ever written beside the images.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tuner.core.config import DataConfig, MaskFolder, SourceConfig
from tuner.core.data.metadata import CaptionTable, read_table
from tuner.core.data.probe import FOREIGN, Probe, image_extensions, probe_all
from tuner.core.data.records import ImageRecord, Skip, SourceIndex
from tuner.core.data.sidecar import caption_paths, face_of, raw_caption
from tuner.core.data.store import IndexStore, index_path
from tuner.core.errors import UsageError

log = logging.getLogger(__name__)

CHUNK = 1000
"""So many files are read before what was learned is stored: a killed scan of many files goes on from there."""

_LISTED = 5
"""So many file names are written out in one message; the others are counted."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file of the source, not read yet. ``missing``: a link to nothing."""

    key: str
    path: Path
    size: int = 0
    mtime_ns: int = 0
    missing: bool = False


def scan_source(
    source: SourceConfig,
    cache_dir: Path,
    *,
    data: DataConfig,
    verify: str = "stat",
    on_progress: Callable[[int], None] | None = None,
) -> SourceIndex:
    """Index one source.

    cache_dir: ``cache.dir``, where the stored index lies. data: for ``on_missing``, ``on_corrupt`` and the number of
    workers. verify: ``stat`` trusts unchanged files, ``full`` reads every file again. on_progress is called with 1
    after each file that is read.

    Never raises for the data: everything wrong with it is in ``problems``, so that several sources can be told at once.
    """
    scan = _Scan(source, Path(source.path).expanduser(), cache_dir, data, verify, on_progress)
    files = scan.list_images()
    if not scan.problems:
        scan.describe(files)
    return SourceIndex(
        source=source.id,
        root=scan.root,
        records=tuple(scan.records),
        skipped=tuple(scan.skipped),
        problems=tuple(scan.problems),
        notes=tuple(scan.notes),
        hashed=scan.hashed,
    )


def scan_sources(data: DataConfig, cache_dir: Path, *, verify: str = "stat") -> dict[str, SourceIndex]:
    """``scan_source`` of every enabled source, by its id."""
    return {
        source.id: scan_source(source, cache_dir, data=data, verify=verify)
        for each in data.sets
        for source in each.sources
        if source.enabled
    }


@dataclass(slots=True)
class _Scan:
    """The state of one scan; its steps run in the order of their definition."""

    source: SourceConfig
    root: Path
    cache_dir: Path
    data: DataConfig
    verify: str
    on_progress: Callable[[int], None] | None = None
    records: list[ImageRecord] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    problems: list[UsageError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hashed: int = 0

    def list_images(self) -> list[Found]:
        """All image files, sorted by key; a folder that cannot be used is a problem."""
        where = f'source "{self.source.id}"'
        if not self.root.is_dir():
            what = f"{self.root} is not a folder" if self.root.exists() else f"the folder {self.root} does not exist"
            self.problems.append(UsageError(what, where=where, fix="correct the path of the source"))
            return []
        try:
            files = list(_walk(self.root, recursive=self.source.recursive, leave_out=self._mask_root()))
        except OSError as error:
            what = f"the folder {error.filename or self.root} cannot be read"
            self.problems.append(UsageError(what, where=where, why=error.strerror))
            return []
        images = [file for file in files if _extension(file) in image_extensions() | FOREIGN]
        if not images:
            why = "it holds no file with the extension of an image"
            if not self.source.recursive and any(path.is_dir() for path in self.root.iterdir()):
                why += "; subfolders are read only with recursive"
            self.problems.append(
                UsageError(f"the folder {self.root} has no images", where=where, why=why, fix="correct the path")
            )
        return images

    def describe(self, files: Sequence[Found]) -> None:
        """Turn files into records, with captions and masks."""
        masks = self._list_masks()
        store = IndexStore(index_path(self.cache_dir, self.source.id, self.root))
        probes = self._probe(store, files, masks)
        table = self._table()
        usable = [file for file in files if self._accept(file, probes.get(_image_name(file)))]
        for file in usable:
            record = self._record(file, probes[_image_name(file)], table)
            record = None if record is None else self._with_mask(record, masks, probes)
            if record is not None:
                self.records.append(record)
        self._summarise(table)

    def _probe(self, store: IndexStore, files: Sequence[Found], masks: dict[str, list[Found]]) -> dict[str, Probe]:
        """What is known of each file, by its name in the store; files that the store does not know are read."""
        wanted = {_image_name(file): file for file in files if not file.missing}
        wanted |= {_mask_name(file): file for group in masks.values() for file in group if not file.missing}
        stored = store.load()
        trusted = self.verify != "full"
        # What may be skipped must be known before the plan is made, and only decoding finds every damage.
        decode = self.data.on_corrupt == "skip"
        known = {
            name: stored[name].probe
            for name, file in wanted.items()
            if trusted and name in stored and stored[name].trusted(file.size, file.mtime_ns)
            if stored[name].probe.decoded or not decode
        }
        unknown = {name: file for name, file in wanted.items() if name not in known}
        workers = self.data.workers.scan
        workers = workers if workers is not None else (os.cpu_count() or 1)
        store.update({}, [name for name in stored if name not in wanted])
        names = list(unknown)
        read: dict[str, Probe] = {}
        begun = time.monotonic()
        for start in range(0, len(names), CHUNK):
            part = names[start : start + CHUNK]
            paths = [unknown[name].path for name in part]
            probes = dict(
                zip(part, probe_all(paths, workers, decode=decode, on_progress=self.on_progress), strict=True)
            )
            usable = {name: each for name, each in probes.items() if each.error is None}
            store.update({name: (wanted[name].size, wanted[name].mtime_ns, each) for name, each in usable.items()})
            read |= probes
            if len(names) > CHUNK:
                left = (time.monotonic() - begun) * (len(names) - len(read)) / len(read)
                log.info("%s: %d of %d files read, about %.0f s left", self.source.id, len(read), len(names), left)
        self.hashed = len(read)
        return known | read

    def _accept(self, file: Found, probe: Probe | None) -> bool:
        if probe is None:
            self._missing(file.key, "the file is a link to nothing")
            return False
        if _extension(file) not in image_extensions():
            self._corrupt(file.key, f"{_extension(file)} files cannot be read: convert it to PNG, JPEG or WebP")
            return False
        if probe.error is not None:
            self._corrupt(file.key, probe.error)
            return False
        return True

    def _record(self, file: Found, probe: Probe, table: CaptionTable | None) -> ImageRecord | None:
        captions = self.source.captions
        raw = raw_caption(captions, file.path, file.key, table)
        if raw.problem is not None:
            fix = "write a caption, remove the file, or set captions.allow_empty" if "empty" in raw.problem else None
            self.problems.append(UsageError(raw.problem, where=str(raw.path), fix=fix))
            return None
        if raw.text is None and captions.on_missing == "skip":
            self.skipped.append(Skip(key=file.key, reason="no caption"))
            return None
        if raw.text is None and captions.on_missing == "error":
            self.problems.append(self._no_caption(file, table))
            return None
        return ImageRecord(
            source=self.source.id,
            key=file.key,
            path=file.path,
            digest=probe.digest,
            width=probe.width,
            height=probe.height,
            mode=probe.mode,
            orientation=probe.orientation,
            alpha=probe.alpha,
            captions_raw=raw.text or "",
            caption_path=raw.path,
            face=face_of(PurePosixPath(file.key).stem),
        )

    def _no_caption(self, file: Found, table: CaptionTable | None) -> UsageError:
        tried = caption_paths(self.source.captions, file.path)
        why = f"there is no {' or '.join(path.name for path in tried)} beside it"
        if table is not None:
            why = f"{table.path} has no entry for it"
        fix = 'write one, set captions.fallback, or set captions.on_missing to "empty" or "skip"'
        return UsageError("an image has no caption", where=f"{self.source.id}/{file.key}", why=why, fix=fix)

    def _with_mask(
        self, record: ImageRecord, masks: dict[str, list[Found]], probes: dict[str, Probe]
    ) -> ImageRecord | None:
        if not isinstance(self.source.mask, MaskFolder):
            return record
        folder = self.source.mask.path
        found = masks.get(_stem(record.key), [])
        if not found:
            self._missing(record.key, f"no mask in {folder}")
            return None
        if len(found) > 1:
            names = ", ".join(file.key for file in found)
            self.problems.append(UsageError("an image has several masks", where=record.name, why=f"{folder}: {names}"))
            return None
        probe = probes.get(_mask_name(found[0]))
        if probe is None:
            self._missing(record.key, f"its mask {found[0].path} is a link to nothing")
            return None
        if probe.error is not None:
            self._corrupt(record.key, f"its mask {found[0].path} cannot be used: {probe.error}")
            return None
        if abs(probe.width * record.height - probe.height * record.width) > 0.01 * probe.height * record.width:
            what = f"a mask of {probe.width}x{probe.height} for an image of {record.width}x{record.height}"
            self.problems.append(UsageError(what, where=str(found[0].path), fix="give both the same shape"))
            return None
        return ImageRecord(
            **{name: getattr(record, name) for name in ImageRecord.__slots__}
            | {"mask_path": found[0].path, "mask_digest": probe.digest}
        )

    def _mask_root(self) -> Path | None:
        mask = self.source.mask
        return Path(mask.path).expanduser() if isinstance(mask, MaskFolder) else None

    def _list_masks(self) -> dict[str, list[Found]]:
        """Mask files by the path of the image they belong to, without extension."""
        root = self._mask_root()
        if root is None:
            return {}
        if not root.is_dir():
            what = f"the mask folder {root} does not exist"
            where = f'source "{self.source.id}"'
            self.problems.append(UsageError(what, where=where, fix="correct mask.path"))
            return {}
        try:
            files = list(_walk(root, recursive=self.source.recursive, leave_out=None))
        except OSError as error:
            what = f"the mask folder {error.filename or root} cannot be read"
            self.problems.append(UsageError(what, where=f'source "{self.source.id}"', why=error.strerror))
            return {}
        masks: dict[str, list[Found]] = {}
        for file in files:
            if _extension(file) in image_extensions():
                masks.setdefault(_stem(file.key), []).append(file)
        return masks

    def _table(self) -> CaptionTable | None:
        if self.source.captions.from_ != "metadata":
            return None
        table, problems = read_table(self.source.captions, self.root)
        self.problems.extend(problems)
        return table

    def _summarise(self, table: CaptionTable | None) -> None:
        if table is not None:
            for key in table.unused():
                self._missing(key, f"{table.path} lists it and there is no such image")
        if self.source.mask == "alpha":
            opaque = [record.key for record in self.records if not record.alpha]
            if opaque:
                self.notes.append(f"{self.source.id}: no transparency, so a mask of ones: {_some(opaque)}")
        if not self.records and not self.problems:
            where = f'source "{self.source.id}"'
            self.problems.append(UsageError("every image of the source was skipped", where=where))

    def _missing(self, key: str, reason: str) -> None:
        self._refuse(key, reason, self.data.on_missing, "data.on_missing")

    def _corrupt(self, key: str, reason: str) -> None:
        self._refuse(key, reason, self.data.on_corrupt, "data.on_corrupt")

    def _refuse(self, key: str, reason: str, policy: str, setting: str) -> None:
        if policy == "skip":
            self.skipped.append(Skip(key=key, reason=reason))
            return
        fix = f'repair or remove it, or set {setting} to "skip"'
        self.problems.append(
            UsageError("an image cannot be used", where=f"{self.source.id}/{key}", why=reason, fix=fix)
        )


def _walk(root: Path, *, recursive: bool, leave_out: Path | None) -> Iterator[Found]:
    """Files below ``root`` sorted by key, hidden ones left out. A folder reached twice through links is read once."""
    skip = leave_out.resolve() if leave_out is not None else None
    found: list[Found] = []
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        folder = pending.pop()
        stat = folder.stat()
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if recursive and path.resolve() != skip:
                        pending.append(path)
                    continue
                key = path.relative_to(root).as_posix()
                if entry.is_file():
                    status = entry.stat()
                    found.append(Found(key, path, status.st_size, status.st_mtime_ns))
                elif entry.is_symlink():
                    found.append(Found(key, path, missing=True))
    yield from sorted(found, key=lambda file: file.key)


def _extension(file: Found) -> str:
    return file.path.suffix.lower()


def _stem(key: str) -> str:
    return str(PurePosixPath(key).with_suffix(""))


def _image_name(file: Found) -> str:
    return f"image:{file.key}"


def _mask_name(file: Found) -> str:
    return f"mask:{file.key}"


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:_LISTED])
    return shown if len(keys) <= _LISTED else f"{shown} and {len(keys) - _LISTED} more"
