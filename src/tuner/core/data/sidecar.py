"""The raw caption of an image: from a file beside it, its own name, a table, or one fixed text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tuner.core.config import CaptionsConfig
from tuner.core.data.metadata import CaptionTable

_FACE = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)$")


@dataclass(frozen=True, slots=True)
class RawCaption:
    """text is None when the image has no caption; problem says what is wrong with the one it has."""

    text: str | None
    path: Path | None = None
    problem: str | None = None


def face_of(stem: str) -> tuple[int, int, int, int] | None:
    """(centre x, centre y, width, height) in pixels, from a file name that ends with ``_cx_cy_w_h``."""
    found = _FACE.search(stem)
    if found is None:
        return None
    x, y, width, height = (int(number) for number in found.groups())
    return (x, y, width, height) if width and height else None


def raw_caption(config: CaptionsConfig, image: Path, key: str, table: CaptionTable | None) -> RawCaption:
    """The text of one image before the pipeline, fallback included.

    key: posix path of the image inside its source. table: for captions from metadata.
    """
    if config.from_ == "fixed":
        return RawCaption(config.fixed or "")
    if config.from_ == "filename":
        return RawCaption(PurePosixPath(key).stem.replace("_", " "))
    if config.from_ == "metadata":
        found = RawCaption(table.find(key) if table is not None else None, table.path if table is not None else None)
    else:
        found = _from_file(config, image)
    if found.problem is None and found.text is None:
        return RawCaption(config.fallback, found.path)
    if found.text is not None and config.rule == "sd_scripts":
        return RawCaption(_as_sd_scripts_loads(found.text, config), found.path)
    return found


def caption_paths(config: CaptionsConfig, image: Path) -> list[Path]:
    """Where the caption file of an image may lie, best first: also without face coordinates in the name."""
    extension = config.extension if config.extension.startswith(".") else f".{config.extension}"
    stems = [image.stem]
    parts = image.stem.split("_")
    if len(parts) >= 5:
        stems.append("_".join(parts[:-4]))
    return [image.with_name(stem + extension) for stem in stems]


def _from_file(config: CaptionsConfig, image: Path) -> RawCaption:
    for path in caption_paths(config, image):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            return RawCaption(None, path, f"the caption file cannot be read: {error.strerror or error}")
        try:
            text = data.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            return RawCaption(None, path, f"the caption file is not UTF-8: {error.reason} at byte {error.start}")
        if not text.strip() and not config.allow_empty:
            return RawCaption(None, path, "the caption file is empty")
        return RawCaption(text, path)
    return RawCaption(None)


def _as_sd_scripts_loads(text: str, config: CaptionsConfig) -> str:
    """The first line, or all lines that are not blank when a line is drawn at each visit; all of it for ``join``."""
    lines = [line.strip() for line in text.split("\n")]
    if config.lines == "first":
        return lines[0]
    return "\n".join(line for line in lines if line)
