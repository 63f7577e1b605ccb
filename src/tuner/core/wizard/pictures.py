"""The conversation about the pictures: a folder, its captions, what is odd in it. Nothing in it is changed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tuner.core.config import DataConfig
from tuner.core.data.index import scan_source
from tuner.core.data.inspect import inspect_indices
from tuner.core.data.probe import image_extensions
from tuner.core.data.records import Size, SourceIndex
from tuner.core.errors import UsageError
from tuner.core.wizard import reasons
from tuner.core.wizard.questions import NOTHING, Interview, Question, text_or_nothing

EXTENSIONS = (".txt", ".caption")
_SHOWN = 5
_MANY = 300
"""From so many pictures on the look takes long enough to be announced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What a folder holds. size: edge of a square of the median area. captions: texts of those that have one.

    uncaptioned: keys of pictures without a caption file; empty: how many of those files are empty. odd: files that
    cannot be used, and why. notes: what is rarely meant.
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
        return text + [f"odd: {each}" for each in self.odd[:_SHOWN]] + [f"note: {each}" for each in self.notes[:_SHOWN]]


@dataclass(slots=True, kw_only=True)
class ChosenPictures:
    """source: settings of the data source. data: settings of the whole section. comments: why, by key of the source or
    ``data.KEY``. trigger: the word for what is learned, empty for none."""

    pictures: Pictures
    source: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    trigger: str = ""


def choose_pictures(interview: Interview, cache: Path, *, now: Mapping[str, Any] | None = None) -> ChosenPictures:
    """Ask for the folder and for what its captions leave open. cache: a folder for what is learned about files.

    now: the source of an existing configuration.
    """
    before = None if now is None else str(now.get("path", "")) or None
    pictures = interview.ask(
        Question(
            id="pictures",
            kind="place",
            text="In which folder are your pictures?",
            help="A text file of the same name beside a picture is its caption.",
            read=partial(_read_folder, interview, cache),
            default=before,
        )
    )
    interview.tell(*pictures.lines())
    inner = not pictures.recursive and _has_inner_pictures(pictures.root)
    if inner and interview.confirm("subfolders", "Take the pictures in its subfolders as well?", default=False):
        pictures = look_at_pictures(pictures.root, cache, recursive=True)
        interview.tell(*pictures.lines())
    chosen = ChosenPictures(pictures=pictures, source={"path": str(pictures.root)})
    if pictures.recursive:
        chosen.source["recursive"] = True
    if pictures.odd and interview.confirm(
        "skip_odd", "Leave out the files that cannot be used?", default=True, help="No: repair them before training."
    ):
        chosen.data |= {"on_corrupt": "skip", "on_missing": "skip"}
        chosen.comments["data.on_corrupt"] = reasons.SKIPPED.format(count=len(pictures.odd))
    _ask_captions(interview, chosen, dict((now or {}).get("captions") or {}))
    return chosen


def look_at_pictures(root: Path, cache: Path, *, recursive: bool = False) -> Pictures:
    """What is in a folder, from the files' headers. UsageError when it holds no picture that can be used."""
    extension = _extension_of(root)
    source = {
        "id": "pictures",
        "path": str(root),
        "recursive": recursive,
        "captions": {"extension": extension, "on_missing": "empty", "allow_empty": True},
    }
    data = DataConfig.model_validate({"sets": [{"sources": [source]}]})
    index = scan_source(data.sets[0].sources[0], cache, data=data)
    report = inspect_indices(data, [index], decode=False)
    if not index.records:
        raise index.problems[0] if index.problems else UsageError("there are no pictures", where=str(root))
    areas = [record.width * record.height for record in index.records]
    described = report.sources[0]
    assert described.smallest is not None and described.largest is not None
    return Pictures(
        root=root,
        recursive=recursive,
        extension=extension,
        images=len(index.records),
        smallest=described.smallest,
        largest=described.largest,
        size=round(statistics.median(areas) ** 0.5),
        captions=tuple(record.captions_raw.strip() for record in index.records if record.captions_raw.strip()),
        uncaptioned=tuple(record.key for record in index.records if record.caption_path is None),
        empty=sum(record.caption_path is not None and not record.captions_raw.strip() for record in index.records),
        odd=tuple(_odd(problem) for problem in index.problems),
        notes=tuple(f"the same picture several times: {_some(names)}" for names in _bare(report.duplicates, index)),
    )


def _read_folder(interview: Interview, cache: Path, raw: Any) -> Pictures:
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
    if count > _MANY:
        interview.tell(f"looking at {count} pictures: each file is read once")
    return look_at_pictures(root, cache, recursive=recursive)


def _ask_captions(interview: Interview, chosen: ChosenPictures, now: dict[str, Any]) -> None:
    """What stands for absent captions, and the word for what is learned."""
    pictures = chosen.pictures
    captions: dict[str, Any] = dict(now)
    if pictures.extension != EXTENSIONS[0]:
        captions["extension"] = pictures.extension
    if pictures.empty:
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
                default=now.get("fallback"),
            )
        )
    elif missing:
        text = interview.ask(
            Question(
                id="caption",
                text=f"{missing} pictures have no caption. Which text describes them?",
                help=f"{NOTHING} leaves these pictures out.",
                read=text_or_nothing,
                default=str(now.get("fallback") or NOTHING),
            )
        )
    if text:
        captions["fallback"] = text
        chosen.comments["captions"] = reasons.FALLBACK.format(count=missing)
    elif missing:
        captions["on_missing"] = "skip"
        chosen.comments["captions"] = reasons.UNCAPTIONED.format(count=missing)
    before = str(now.get("prefix") or "").removesuffix(",")
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
        captions.pop("prefix", None)
    texts = [*pictures.captions, *([text] if text else [])]
    lacking = sum(chosen.trigger.lower() not in each.lower() for each in texts)
    if chosen.trigger and 2 * lacking > len(texts):
        captions["prefix"] = f"{chosen.trigger},"
        chosen.comments["captions"] = reasons.PREFIX.format(lacking=lacking, count=len(texts))
    if captions:
        chosen.source["captions"] = captions


def _some_text(raw: Any) -> str:
    text = text_or_nothing(raw)
    if not text:
        raise UsageError("a text is needed: nothing can be learned without words")
    return text


def _extension_of(root: Path) -> str:
    """Of caption files, by what there is more of."""
    counts = {each: sum(1 for path in root.rglob(f"*{each}")) for each in EXTENSIONS}
    return max(EXTENSIONS, key=lambda each: counts[each])


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in image_extensions() for path in folder.iterdir() if path.is_file())


def _has_inner_pictures(folder: Path) -> bool:
    inner = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return any(path.suffix.lower() in image_extensions() for each in inner for path in each.rglob("*"))


def _odd(problem: UsageError) -> str:
    place = (problem.where or "").removeprefix("pictures/")
    return f"{place}: {problem.why or problem.what}" if place else problem.what


def _bare(groups: tuple[tuple[str, ...], ...], index: SourceIndex) -> list[tuple[str, ...]]:
    return [tuple(name.removeprefix(f"{index.source}/") for name in group) for group in groups]


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
