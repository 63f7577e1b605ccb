"""Metadata of a weight file: what they say about a training, and copies of the file that say less."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tuner.core.adapters.spelling import PEFT_METADATA

if TYPE_CHECKING:
    from tuner.core.files import WeightHeader

Level = Literal["private", "training", "all"]
LEVELS: Mapping[Level, str] = {
    "private": "paths, names of files and folders, captions, tags, prompts, comments, times of day",
    "training": "also every setting of the training; what the file is and its network stay",
    "all": "everything that a loader does not need",
}
NEEDED = ("format", PEFT_METADATA)
"""What loaders read: without the second, PEFT's, an adapter may act with another strength."""
PEFT_SOURCE = re.compile(r"(.*\.)?(base_model_name_or_path|revision)")
"""Settings in it that say where the base model came from; loaders of the file have that model already."""
DESCRIBES = re.compile(
    r"modelspec\..*|ss_base_model_version|ss_network_(module|dim|alpha|args|dropout)|sshs_model_hash|tuner_version"
)
"""What the file is, and what its author wrote for its readers."""
TELLING = re.compile(r"ss_(session_id|training_started_at|training_finished_at)|modelspec\.(date|merged_from)")
"""What says when, and which files a merge was made of."""
SETTINGS = re.compile(r"ss_(optimizer|lr_scheduler|loss_type|mixed_precision|.*_(type|scheme|sampling|version))")
"""Words that are names of methods."""
NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false|none|null", re.IGNORECASE)
PLACE = re.compile(r"(^|[\s\"'=(\[])([A-Za-z]:[\\/]|~?/(?!/)\w|\\\\)")
"""Where a path of a file system begins; addresses of the web do not match."""


def kept_metadata(metadata: Mapping[str, str], level: Level) -> dict[str, str]:
    """The metadata that a copy at this level still has: a list of what may stay, so that unknown keys go."""
    kept = {key: value for key, value in metadata.items() if _stays(key, value, level)}
    text = _without_source(kept.pop(PEFT_METADATA, ""))
    return {**kept, PEFT_METADATA: text} if text else kept


def _without_source(text: str) -> str:
    """PEFT's settings without names of places; nothing of a text that no loader can read as settings."""
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(settings, dict):
        return ""
    kept = {
        key: value
        for key, value in settings.items()
        if not PEFT_SOURCE.fullmatch(key) and not (isinstance(value, str) and PLACE.search(value))
    }
    return text if kept == settings else json.dumps(kept, indent=2, sort_keys=True)


def _stays(key: str, value: str, level: Level) -> bool:
    if key in NEEDED:
        return True
    if level == "all" or PLACE.search(value) or TELLING.fullmatch(key):
        return False
    if DESCRIBES.fullmatch(key):
        return True
    return level == "private" and _is_setting(key, value)


def _is_setting(key: str, value: str) -> bool:
    return key.startswith("ss_") and bool(NUMBER.fullmatch(value.strip()) or SETTINGS.fullmatch(key))


def strip(header: WeightHeader, path: Path, level: Level) -> list[str]:
    """Write a copy of a file with the same bytes of tensors and fewer metadata; returns the keys that changed."""
    # What only looks at metadata should not pay for torch.
    from tuner.core.adapters.streams import copied, write_tensors

    kept = kept_metadata(header.metadata, level)
    write_tensors(path, {key: copied(info) for key, info in header.items()}, kept)
    return [key for key, value in header.metadata.items() if kept.get(key) != value]
