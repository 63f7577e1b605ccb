"""Captions from one table per source: a JSON object from image to entry, or a list of entries (JSON or JSON lines).

An entry belongs to an image when its key is exactly the image's path inside the source, with or without extension, or
its absolute path. Never by a prefix: ``img1`` has nothing to do with ``img10``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tuner.core.config import CaptionsConfig, MetadataFields
from tuner.core.errors import UsageError


@dataclass(slots=True)
class CaptionTable:
    """Captions by key, and which keys have been asked for."""

    path: Path
    texts: dict[str, str]
    used: set[str] = field(default_factory=set)

    def find(self, key: str) -> str | None:
        """The caption of the image at ``key``, its posix path inside the source; None when there is no entry."""
        for name in (key, str(PurePosixPath(key).with_suffix(""))):
            if name in self.texts:
                self.used.add(name)
                return self.texts[name]
        return None

    def unused(self) -> list[str]:
        """Entries that no image asked for."""
        return [key for key in self.texts if key not in self.used]


def read_table(config: CaptionsConfig, root: Path) -> tuple[CaptionTable | None, list[UsageError]]:
    """The table of a source whose images lie in ``root``, and every problem found in it."""
    fields = config.metadata
    assert fields is not None
    path = Path(fields.path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = list(_entries(text, path, fields))
    except OSError as error:
        what = "the metadata file cannot be read"
        return None, [UsageError(what, where=str(path), why=error.strerror, fix="check captions.metadata.path")]
    except UnicodeDecodeError as error:
        return None, [UsageError("the metadata file is not UTF-8", where=str(path), why=str(error))]
    except _FormError as error:
        return None, [UsageError("the metadata file does not have the right form", where=str(path), why=str(error))]
    problems: list[UsageError] = []
    texts: dict[str, str] = {}
    for key, entry in entries:
        name = _inside(key, root)
        caption = _caption(entry, config, fields)
        if isinstance(caption, UsageError):
            problems.append(UsageError(caption.what, where=f"{path}: {key}", why=caption.why))
        elif name in texts:
            problems.append(UsageError("two entries for one image", where=f"{path}: {key}"))
        else:
            texts[name] = caption
    return CaptionTable(path, texts), problems


class _FormError(Exception):
    """Tells what is wrong with the form of a table."""


def _entries(text: str, path: Path, fields: MetadataFields) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".jsonl":
        rows: Any = (_parsed(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    else:
        rows = _parsed(text, None)
        if isinstance(rows, dict):
            yield from rows.items()
            return
    if not isinstance(rows, Iterable) or isinstance(rows, str):
        raise _FormError("expected a JSON object from image to entry, or a list of entries")
    for number, row in enumerate(rows, 1):
        name = row.get(fields.filename_column) if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise _FormError(f'entry {number} names no image: expected a text under "{fields.filename_column}"')
        yield name, row


def _parsed(text: str, line: int | None) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _FormError(str(error) if line is None else f"line {line}: {error}") from error


def _inside(key: str, root: Path) -> str:
    """``key`` as a posix path inside ``root``; a path elsewhere stays as it is and matches nothing."""
    path = Path(key)
    if path.is_absolute():
        for base in (root.absolute(), root.resolve()):
            if path.is_relative_to(base):
                return path.relative_to(base).as_posix()
    return path.as_posix()


def _caption(entry: Any, config: CaptionsConfig, fields: MetadataFields) -> str | UsageError:
    """Caption and tags of an entry in one text; tags go to every line when a line is drawn, else to the end."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, Mapping):
        return UsageError("an entry is a text or an object", why=f"found {type(entry).__name__}")
    caption = entry.get(fields.caption_column)
    tags = entry.get(fields.tags_column) if fields.tags_column else None
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = config.join.join(tags)
    for name, value in ((fields.caption_column, caption), (fields.tags_column, tags)):
        if value is not None and not isinstance(value, str):
            return UsageError(f'"{name}" is not a text', why=f"found {type(value).__name__}")
    if caption is None and tags is None:
        wanted = f'"{fields.caption_column}"' + (f' or "{fields.tags_column}"' if fields.tags_column else "")
        return UsageError(f"the entry has no {wanted}", why=f"it has {', '.join(map(repr, entry)) or 'no keys'}")
    return _with_tags(caption or "", tags or "", config)


def _with_tags(caption: str, tags: str, config: CaptionsConfig) -> str:
    if not tags or not caption:
        return caption or tags
    glue = config.separator if config.rule == "sd_scripts" else config.join
    lines = caption.split("\n") if config.lines == "random" else [caption]
    return "\n".join(f"{line}{glue}{tags}" if line.strip() else line for line in lines)
