"""The small frozen records that pass between the stages of the data section.

Sizes are (width, height) in pixels with the EXIF orientation already applied, offsets are (left, top).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tuner.core.errors import UsageError

Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """One image of a source, as far as it is known without its pixels.

    key: posix path relative to the source folder. digest: blake2b-128 of the file's bytes, in hex. mode and
    orientation: as stored in the file. alpha: whether it has transparency. captions_raw: the text before the caption
    pipeline, all lines of it. face: (centre x, centre y, width, height) of a face when the file name carries them.
    """

    source: str
    key: str
    path: Path
    digest: str
    width: int
    height: int
    mode: str
    orientation: int = 1
    alpha: bool = False
    captions_raw: str = ""
    caption_path: Path | None = None
    mask_path: Path | None = None
    mask_digest: str | None = None
    face: tuple[int, int, int, int] | None = None

    @property
    def size(self) -> Size:
        return self.width, self.height

    @property
    def name(self) -> str:
        """How messages call this image."""
        return f"{self.source}/{self.key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """An image that is left out because a setting says so, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceIndex:
    """What a scan of one source found.

    problems must be empty before a run may start; skipped and notes are for the report; hashed counts the files that
    had to be read again because the stored index did not know them.
    """

    source: str
    root: Path
    records: tuple[ImageRecord, ...] = ()
    skipped: tuple[Skip, ...] = ()
    problems: tuple[UsageError, ...] = ()
    notes: tuple[str, ...] = ()
    hashed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How an image of size ``image`` becomes one of size ``bucket``: resize to ``resized``, cut at ``crop``."""

    image: Size
    bucket: Size
    resized: Size
    crop: tuple[int, int]

    @property
    def bucket_key(self) -> str:
        return f"{self.bucket[0]}x{self.bucket[1]}"

    @property
    def scale(self) -> float:
        """Enlargement: 2.0 means that every side doubles."""
        return max(self.resized[0] / self.image[0], self.resized[1] / self.image[1])

    @property
    def cropped_share(self) -> float:
        """Share of the resized pixels that the crop cuts away."""
        return 1.0 - (self.bucket[0] * self.bucket[1]) / (self.resized[0] * self.resized[1])


@dataclass(frozen=True, slots=True)
class Refused:
    """Why an image has no place: it is left out and listed with this reason."""

    reason: str
