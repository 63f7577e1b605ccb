"""The conversation about the pictures: a folder, its captions, what is odd in it. Nothing in it is changed."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuner.core.config import DataConfig
from tuner.core.data.index import scan_source
from tuner.core.data.inspect import DataReport, inspect_indices
from tuner.core.data.probe import image_extensions
from tuner.core.data.records import ImageRecord, Size, SourceIndex
from tuner.core.data.store import index_path
from tuner.core.errors import UsageError
from tuner.core.track.progress import Progress
from tuner.core.wizard import reasons
from tuner.core.wizard.questions import NOTHING, Interview, Question, text_or_nothing

EXTENSIONS = (".txt", ".caption")
_ORIGIN = ("rule", "from", "extension", "fixed", "metadata")
"""Keys of an existing source that tell where its captions come from."""
_SHOWN = 5
_MANY = 300
"""From so many pictures on the look takes long enough to be watched."""
LOOKED_AT = "pictures"
"""The name of the source that a folder is looked at as, before it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What a folder holds. size: edge of a square of the median area. captions: texts of those that have one.

    uncaptioned: keys of pictures without a caption; empty: how many captions are empty. odd: files that cannot be used,
    and why. notes: what is rarely meant.
    """

    root: Path
    recursive: bool
    extension: str
    images: int
    smallest: Size
    largest: Size
    size: int
    captions: tuple[str, ...]
    uncaptioned: tuple[str, ...]
    empty: int = 0
    odd: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For the user."""
        sizes = " to ".join(f"{width} x {height}" for width, height in dict.fromkeys((self.smallest, self.largest)))
        text = [f"{self.images} pictures, {sizes}; {len(self.captions)} with a caption"]
        if self.uncaptioned:
            text.append(f"without caption: {_some(self.uncaptioned)}")
        if self.empty:
            text.append(f"{self.empty} caption files are empty")
        return [*text, *_first("odd", self.odd), *_first("note", self.notes)]


@dataclass(slots=True, kw_only=True)
class ChosenPictures:
    """source: settings of the data source. data: settings of the whole section. comments: why, by key of the source or
    ``data.KEY``. trigger: the word for what is learned, empty for none."""

    pictures: Pictures
    source: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    trigger: str = ""


def choose_pictures(
    interview: Interview,
    cache: Path,
    *,
    now: Mapping[str, Any] | None = None,
    effect: Mapping[str, Any] | None = None,
) -> ChosenPictures:
    """Ask for the folder and for what its captions leave open. cache: a folder for what is learned about files.

    now: the source of an existing configuration; effect: the same with what it inherits.
    """
    name = str((now or {}).get("id", LOOKED_AT))
    own, captions = _captions(now), _captions(effect or now)
    before = None if now is None else _text(now.get("path"))
    pictures = interview.ask(
        Question(
            id="pictures",
            kind="place",
            text="In which folder are your pictures?",
            help="A text file of the same name beside a picture is its caption.",
            read=partial(_read_folder, interview, cache, captions, name),
            default=before,
        )
    )
    interview.tell(*pictures.lines())
    inner = not pictures.recursive and _has_inner_pictures(pictures.root)
    deep = (effect or now or {}).get("recursive") is True
    if inner and interview.confirm("subfolders", "Take the pictures in its subfolders as well?", default=deep):
        pictures = look_at_pictures(pictures.root, cache, name, recursive=True, captions=captions)
        interview.tell(*pictures.lines())
    chosen = ChosenPictures(pictures=pictures, source={"path": str(pictures.root)})
    if pictures.recursive:
        chosen.source["recursive"] = True
    if pictures.odd and interview.confirm(
        "skip_odd", "Leave out the files that cannot be used?", default=True, help="No: repair them before training."
    ):
        chosen.data |= {"on_corrupt": "skip", "on_missing": "skip"}
        chosen.comments["data.on_corrupt"] = reasons.SKIPPED.format(count=len(pictures.odd))
    _ask_captions(interview, chosen, own, captions)
    return chosen


def _captions(source: Mapping[str, Any] | None) -> dict[str, Any]:
    found = (source or {}).get("captions")
    return dict(found) if isinstance(found, Mapping) else {}


def look_at_pictures(
    root: Path,
    cache: Path,
    name: str = LOOKED_AT,
    *,
    recursive: bool = False,
    captions: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Pictures:
    """What is in a folder; every file is read whole. captions: where they come from, as an existing source says it.
    name: of the source, whose plan then need not read the files again.

    UsageError when it holds no picture that can be used, and for captions that cannot be read: leaving those out is no
    setting, so the user has to mend them.
    """
    told = {key: value for key, value in (captions or {}).items() if key in _ORIGIN}
    extension = told["extension"] = _extension_of(root, _text(told.get("extension")), recursive=recursive)
    source = {
        "id": name,
        "path": str(root),
        "recursive": recursive,
        "captions": {**told, "on_missing": "empty", "allow_empty": True},
    }
    # Damage behind a sound header is found too: training would stop at it.
    data = _data({"sets": [{"sources": [source]}], "on_corrupt": "skip", "on_missing": "skip"})
    index = scan_source(data.sets[0].sources[0], cache, data=data, on_progress=on_progress)
    report = inspect_indices(data, [index], decode=False)
    if not index.records and index.skipped:
        raise UsageError("no picture can be used", where=str(root), why=_some(_odd(index), "; "))
    if index.problems:
        raise _to_mend(index.problems)
    areas = [record.width * record.height for record in index.records]
    described = report.sources[0]
    assert described.smallest is not None and described.largest is not None
    size = round(statistics.median(areas) ** 0.5)
    return Pictures(
        root=root,
        recursive=recursive,
        extension=extension,
        images=len(index.records),
        smallest=described.smallest,
        largest=described.largest,
        size=size,
        captions=tuple(record.captions_raw.strip() for record in index.records if record.captions_raw.strip()),
        uncaptioned=tuple(record.key for record in index.records if not _has_caption(record)),
        empty=sum(_has_caption(record) and not record.captions_raw.strip() for record in index.records),
        odd=_odd(index),
        notes=(
            *_tiny(index, size),
            *(f"the same picture several times: {_some(names)}" for names in _twins(report, index)),
        ),
    )


def _has_caption(record: ImageRecord) -> bool:
    return record.caption_path is not None or bool(record.captions_raw)


def _data(document: Mapping[str, Any]) -> DataConfig:
    try:
        return DataConfig.model_validate_json(json.dumps(document))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UsageError("the settings of the captions are wrong", where=where, why=error.errors()[0]["msg"]) from error


def known_as(name: str, root: Path, cache: Path) -> None:
    """What was learned about the files of a folder, for a source of another name."""
    learned = index_path(cache, LOOKED_AT, root)
    if name != LOOKED_AT and learned.is_file():
        shutil.copy(learned, index_path(cache, name, root))


def _read_folder(interview: Interview, cache: Path, captions: Mapping[str, Any], name: str, raw: Any) -> Pictures:
    text = str(raw).strip()
    if not text:
        raise UsageError("a folder is needed")
    root = Path(text).expanduser().absolute()
    if not root.is_dir():
        raise UsageError("this is no folder" if root.exists() else "there is no such folder", fix="check the path")
    recursive = not _has_pictures(root) and _has_inner_pictures(root)
    count = sum(
        path.suffix.lower() in image_extensions() for path in (root.rglob("*") if recursive else root.iterdir())
    )
    if count < _MANY or not interview.asker.patient:
        return look_at_pictures(root, cache, name, recursive=recursive, captions=captions)
    with Progress("looking at the pictures", count, "images") as progress:
        return look_at_pictures(
            root, cache, name, recursive=recursive, captions=captions, on_progress=progress.advance
        )  # fmt: skip


def _ask_captions(interview: Interview, chosen: ChosenPictures, own: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """What stands for absent captions, and the word for what is learned. own: the captions that the source has now;
    now: those in effect, with what it inherits."""
    pictures = chosen.pictures
    captions: dict[str, Any] = dict(own)
    if pictures.extension != now.get("extension", EXTENSIONS[0]):
        captions["extension"] = pictures.extension
    if pictures.empty and now.get("from", "file") == "file":
        captions["allow_empty"] = True
    missing = len(pictures.uncaptioned)
    text = ""
    if missing == pictures.images:
        text = interview.ask(
            Question(
                id="caption",
                text="No picture has a caption. Which text describes all of them?",
                help="Better: write a caption for each. A text such as: a photo of mila",
                read=_some_text,
                default=_text(now.get("fallback")),
            )
        )
    elif missing:
        text = interview.ask(
            Question(
                id="caption",
                text=f"{missing} pictures have no caption. Which text describes them?",
                help=f"{NOTHING} leaves these pictures out.",
                read=text_or_nothing,
                default=_text(now.get("fallback")) or NOTHING,
            )
        )
    if text:
        captions["fallback"] = text
        chosen.comments["captions"] = reasons.FALLBACK.format(count=missing)
    elif missing:
        captions["on_missing"] = "skip"
        _drop(captions, "fallback", now)
        chosen.comments["captions"] = reasons.UNCAPTIONED.format(count=missing)
    before = (_text(now.get("prefix")) or "").removesuffix(",")
    chosen.trigger = interview.ask(
        Question(
            id="trigger",
            text="Which word shall call up what is learned?",
            help=f"A rare word that stands in every prompt for it. {NOTHING} for none.",
            read=text_or_nothing,
            default=before or NOTHING,
        )
    )
    if chosen.trigger != before:
        _drop(captions, "prefix", now)
    texts = [*pictures.captions, *[""] * pictures.empty, *([text] if text else [])]
    lacking = sum(chosen.trigger.lower() not in each.lower() for each in texts)
    if chosen.trigger and 2 * lacking > len(texts):
        if chosen.trigger != before:
            captions["prefix"] = f"{chosen.trigger},"
        chosen.comments["captions"] = reasons.PREFIX.format(lacking=lacking, count=len(texts))
    if captions:
        chosen.source["captions"] = captions


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _drop(captions: dict[str, Any], key: str, now: Mapping[str, Any]) -> None:
    """Take a key out; null where the source would inherit it otherwise."""
    inherited = key not in captions and now.get(key) is not None
    captions.pop(key, None)
    if inherited:
        captions[key] = None


def _some_text(raw: Any) -> str:
    text = text_or_nothing(raw)
    if not text:
        raise UsageError("a text is needed: nothing can be learned without words")
    return text


def _extension_of(root: Path, preferred: str | None, *, recursive: bool) -> str:
    """Of caption files: the preferred one where there is any, else what there is more of."""
    names = [path.name for path in (root.rglob("*") if recursive else root.iterdir())]
    counts = {each: sum(name.endswith(each) for name in names) for each in (preferred, *EXTENSIONS) if each}
    if preferred is not None and (counts[preferred] or not any(counts.values())):
        return preferred
    return max(EXTENSIONS, key=lambda each: counts[each])


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in image_extensions() for path in folder.iterdir() if path.is_file())


def _has_inner_pictures(folder: Path) -> bool:
    inner = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return any(path.suffix.lower() in image_extensions() for each in inner for path in each.rglob("*"))


def _odd(index: SourceIndex) -> tuple[str, ...]:
    return tuple(f"{skip.key}: {skip.reason}" for skip in index.skipped)


def _to_mend(problems: tuple[UsageError, ...]) -> UsageError:
    """What no setting leaves out; one error for all of them."""
    first = problems[0]
    if len(problems) == 1 and first.where is None:
        return first
    told = [f"{each.where}: {each.what}" if each.where else each.what for each in problems]
    return UsageError(
        "something has to be mended first", why=_some(told, "; "), fix=first.fix or "mend it, then answer again"
    )


def _tiny(index: SourceIndex, size: int) -> Iterator[str]:
    """Pictures that are far smaller than the others: they would be blown up."""
    small = [f"{each.key} ({each.width} x {each.height})" for each in index.records
             if each.width * each.height * 16 < size * size]  # fmt: skip
    if small:
        yield f"much smaller than the others: {_some(small)}"


def _twins(report: DataReport, index: SourceIndex) -> list[list[str]]:
    return [[name.removeprefix(f"{index.source}/") for name in group] for group in report.duplicates]


def _first(label: str, lines: Sequence[str]) -> list[str]:
    """The first of many lines, and how many there are besides."""
    more = [f"{label}: {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [*(f"{label}: {each}" for each in lines[:_SHOWN]), *more]


def _some(names: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more
