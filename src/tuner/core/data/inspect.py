"""A thorough look at the data before training: every file is decoded, and everything wrong is told at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tuner.core.config import CaptionsConfig, DataConfig
from tuner.core.data.captions import caption_lines
from tuner.core.data.index import scan_sources
from tuner.core.data.records import ImageRecord, Size, Skip, SourceIndex
from tuner.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReport:
    """One source. smallest and largest are sizes by area; without_caption lists keys whose raw caption is empty.

    further_lines: images whose caption goes on after its first line, which ``captions.lines`` = ``first`` leaves out.
    """

    source: str
    root: Path
    images: int
    smallest: Size | None
    largest: Size | None
    without_caption: tuple[str, ...]
    further_lines: int
    skipped: tuple[Skip, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """All sources. duplicates: names of images with the same bytes, at least two in each group.

    leaks: images that are trained on and are in a validation source too.
    """

    sources: tuple[SourceReport, ...]
    duplicates: tuple[tuple[str, ...], ...]
    leaks: tuple[str, ...]
    problems: tuple[UsageError, ...]

    def warnings(self) -> list[str]:
        """What is not wrong but rarely meant, one line each."""
        lines = [f"the same image several times: {', '.join(names)}" for names in self.duplicates]
        lines += [f"held out and trained on: {leak}" for leak in self.leaks]
        for source in self.sources:
            if source.without_caption:
                count = len(source.without_caption)
                lines.append(f"{source.source}: {count} of {source.images} images have an empty caption")
            if source.further_lines:
                count = source.further_lines
                lines.append(
                    f"{source.source}: only the first line is used of {count} captions that have more; captions.lines"
                    ' can be "random" or "join"'
                )
        return lines


def inspect_data(data: DataConfig, cache_dir: Path, *, verify: str = "stat", decode: bool = True) -> DataReport:
    """Scan every enabled source of ``data`` and, with ``decode``, decode every image and mask.

    Never raises for the data: problems are in the report. Nothing is changed on disk except the stored index.
    """
    return inspect_indices(data, list(scan_sources(data, cache_dir, verify=verify).values()), decode=decode)


def inspect_indices(
    data: DataConfig,
    indices: Sequence[SourceIndex],
    *,
    decode: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """``inspect_data`` for sources that have been scanned; their problems come first.

    on_progress: called with (files that were just decoded, all).
    """
    problems = [problem for index in indices for problem in index.problems]
    records = [record for index in indices for record in index.records]
    if decode:
        problems.extend(decode_errors(records, data.workers.scan, on_progress))
    sources = {source.id: source for each in data.sets for source in each.sources}
    roles = {name: source.role for name, source in sources.items()}
    groups = _same_bytes(records)
    return DataReport(
        sources=tuple(_report(index, sources[index.source].captions) for index in indices),
        # The same file in two sources is a choice; two files with the same bytes are rather an accident.
        duplicates=tuple(
            tuple(record.name for record in group) for group in groups if len({record.path for record in group}) > 1
        ),
        leaks=tuple(name for group in groups for name in _leaks(group, roles)),
        problems=tuple(problems),
    )


def decode_errors(
    records: Sequence[ImageRecord],
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[UsageError]:
    """The error of every image or mask that cannot be decoded. workers: threads; None for one per CPU core."""
    files = dict.fromkeys(path for record in records for path in (record.path, record.mask_path) if path is not None)
    return broken_files(files, workers, on_progress)


def broken_files(
    files: Collection[Path], workers: int | None = None, on_progress: Callable[[int, int], None] | None = None
) -> list[UsageError]:
    """The error of every file that cannot be decoded; on_progress is called with (1, all) after each."""
    found = []
    with ThreadPoolExecutor(max_workers=thread_count(workers)) as pool:
        for error in pool.map(_decode_error, files):
            if error is not None:
                found.append(error)
            if on_progress is not None:
                on_progress(1, len(files))
    return found


def thread_count(workers: int | None) -> int:
    """``data.workers.scan`` as a number of threads: one per CPU core when it is left out, never none."""
    return max(1, workers if workers is not None else os.cpu_count() or 1)


def _decode_error(path: Path) -> UsageError | None:
    # What only looks at headers should not pay for torch.
    from tuner.core.data.images import open_upright

    try:
        open_upright(path)
    except UsageError as error:
        return error
    return None


def _report(index: SourceIndex, captions: CaptionsConfig) -> SourceReport:
    by_area = sorted((record.size for record in index.records), key=lambda size: size[0] * size[1])
    return SourceReport(
        source=index.source,
        root=index.root,
        images=len(index.records),
        smallest=by_area[0] if by_area else None,
        largest=by_area[-1] if by_area else None,
        without_caption=tuple(record.key for record in index.records if not record.captions_raw.strip()),
        further_lines=sum(
            captions.lines == "first" and len(caption_lines(record.captions_raw)) > 1 for record in index.records
        ),
        skipped=index.skipped,
        notes=index.notes,
    )


def _same_bytes(records: Iterable[ImageRecord]) -> list[list[ImageRecord]]:
    groups: dict[str, list[ImageRecord]] = {}
    for record in records:
        groups.setdefault(record.digest, []).append(record)
    return [group for group in groups.values() if len(group) > 1]


def _leaks(group: Sequence[ImageRecord], roles: Mapping[str, str]) -> list[str]:
    held_out = [record for record in group if roles[record.source] == "validation"]
    trained = [record for record in group if roles[record.source] == "train"]
    return [f"{each.name} is also {trained[0].name}" for each in held_out] if trained else []
