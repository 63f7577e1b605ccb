"""Captions in numbers: how long they are, and which tags they are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tuner.core.config import CaptionsConfig
from tuner.core.data.captions import plain_caption
from tuner.core.data.records import ImageRecord

SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionReport:
    """The captions of one source as they are without random choices.

    empty: images without any. longest: (characters, image). texts: distinct captions. tags: the most common parts
    between separators with the number of captions that have them; distinct_tags: of all. shared: tags of every caption.
    """

    source: str
    images: int
    empty: tuple[str, ...]
    longest: tuple[int, str] | None
    mean_length: float
    texts: int
    tags: tuple[tuple[str, int], ...]
    distinct_tags: int
    shared: tuple[str, ...]


def caption_report(source: str, config: CaptionsConfig, records: Iterable[ImageRecord]) -> CaptionReport:
    """Count what the captions of a source are made of; a tag counts once per caption."""
    captions = {record.key: plain_caption(config, record.captions_raw) for record in records}
    texts = [text for text in captions.values() if text.strip()]
    counts = Counter(tag for text in texts for tag in dict.fromkeys(_tags(text, config.separator)))
    longest = max(((len(text), key) for key, text in captions.items()), default=None)
    return CaptionReport(
        source=source,
        images=len(captions),
        empty=tuple(key for key, text in captions.items() if not text.strip()),
        longest=longest,
        mean_length=sum(map(len, texts)) / len(texts) if texts else 0.0,
        texts=len(set(texts)),
        tags=tuple((tag, count) for tag, count in counts.most_common(SHOWN) if count > 1),
        distinct_tags=len(counts),
        shared=tuple(tag for tag, count in counts.items() if count == len(texts) > 1),
    )


def _tags(text: str, separator: str) -> Iterable[str]:
    parts = text.split(separator) if separator else [text]
    return (part.strip() for part in parts if part.strip())
