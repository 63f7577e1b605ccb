"""Which keys hold paths, and what a relative one is relative to.

One rule: a relative path in a file is relative to the folder of that file, outputs included, so a folder with a
configuration can be moved. A relative path typed on the command line or in the environment is relative to the current
directory, as shells complete it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from tuner.core.config.jsonc import Path

_SOURCE = r"(data\.defaults\.|data\.sets\.\d+\.(sources\.\d+\.)?)"
_PLAIN = re.compile(
    r"cache\.dir|checkpoint\.(dir|resume)|(network|ema)\.init_from|sample\.prompts|log\.(dir|file)|data\.include"
    r"|model\.(\w+\.)*\w*_dir|(model\.merge|sample\.adapters)\.\d+\.path"
    rf"|{_SOURCE}(path|mask\.path|captions\.metadata(\.path)?)"
)
_WEIGHTS = re.compile(r"model\.(\w+\.)*path")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[\w. -]+)*")
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
_FILE_SUFFIXES = (*WEIGHT_SUFFIXES, ".json")
_WORDS = {"checkpoint.resume": ("none", "auto")}


def absolute_paths(value: Any, base: FilePath, path: Path = ()) -> Any:
    """A copy of ``value``, found at ``path`` of the document, in which path values are absolute from ``base``."""
    if isinstance(value, Mapping):
        return {key: absolute_paths(below, base, (*path, key)) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [absolute_paths(below, base, (*path, index)) for index, below in enumerate(value)]
    if not isinstance(value, str) or not value:
        return value
    name = ".".join(str(part) for part in path)
    if value in _WORDS.get(name, ()):
        return value
    if _PLAIN.fullmatch(name):
        return absolute(value, base)
    if _WEIGHTS.fullmatch(name):
        return value if is_hub_id(value, base) else absolute(value, base)
    return value


def absolute(value: str, base: FilePath) -> str:
    """``value`` from ``base``; ``~`` is the home folder. Links are kept as they are."""
    return str(FilePath(base, FilePath(value).expanduser()).absolute())


def is_hub_id(value: str, base: FilePath) -> bool:
    """Whether ``value`` names a repository, ``owner/name``, or a place inside one, and not something on this machine.

    A path whose first folder exists is meant to be local, and so is ``folder/file.safetensors``.
    """
    if not _HUB_ID.fullmatch(value) or FilePath(base, value.split("/")[0]).exists():
        return False
    return value.count("/") > 1 or not value.endswith(_FILE_SUFFIXES)
