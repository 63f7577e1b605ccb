"""Metadata of a weight file: what they say about a training, and copies of the file that say less."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tuner.core.files import WeightHeader

Level = Literal["private", "training", "all"]
LEVELS: Mapping[Level, str] = {
    "private": "paths, names of files and folders, captions, tags, prompts, comments, times of day",
    "training": "also every setting of the training; what the file is and its network stay",
    "all": "everything that a loader does not need",
}
NEEDED = ("format", "lora_adapter_metadata")
"""What loaders read: without the second, PEFT's, an adapter may act with another strength."""
DESCRIBES = re.compile(
    r"modelspec\..*|ss_base_model_version|ss_network_(module|dim|alpha|args|dropout)|sshs_model_hash|tuner_version"
)
"""What the file is, and what its author wrote for its readers."""
TELLING = re.compile(r"ss_(session_id|training_started_at|training_finished_at)")
"""Numbers that say when."""
SETTINGS = re.compile(r"ss_(optimizer|lr_scheduler|loss_type|mixed_precision|.*_(type|scheme|sampling|version))")
"""Words that are names of methods."""
NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false|none|null", re.IGNORECASE)
PLACE = re.compile(r"(^|[\s\"'=(\[])([A-Za-z]:[\\/]|~?/(?!/)\w|\\\\)")
"""Where a path of a file system begins; addresses of the web do not match."""


def kept_metadata(metadata: Mapping[str, str], level: Level) -> dict[str, str]:
    """The metadata that a copy at this level still has: a list of what may stay, so that unknown keys go."""
    return {key: value for key, value in metadata.items() if _stays(key, value, level)}


def _stays(key: str, value: str, level: Level) -> bool:
    if key in NEEDED:
        return True
    if level == "all" or PLACE.search(value):
        return False
    if DESCRIBES.fullmatch(key):
        return True
    return level == "private" and not TELLING.fullmatch(key) and _is_setting(key, value)


def _is_setting(key: str, value: str) -> bool:
    return key.startswith("ss_") and bool(NUMBER.fullmatch(value.strip()) or SETTINGS.fullmatch(key))


def strip(header: WeightHeader, path: Path, level: Level) -> list[str]:
    """Write a copy of a file with the same bytes of tensors and fewer metadata; returns the removed keys."""
    from tuner.core.adapters.streams import copied, write_tensors

    kept = kept_metadata(header.metadata, level)
    write_tensors(path, {key: copied(info) for key, info in header.items()}, kept)
    return [key for key in header.metadata if key not in kept]
