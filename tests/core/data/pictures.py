"""Small picture files of every kind, made by formula."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from tuner.core.config import DataConfig

OLD_NS = 1_600_000_000_000_000_000
"""A time stamp long before any test runs, so that a stored index may trust the file."""


def pattern(width: int, height: int, seed: int = 0) -> np.ndarray:
    """[height, width, 3] uint8: a slope to the right in red, downwards in green, and a number in blue."""
    across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return np.stack([across, down, np.full((height, width), seed % 256)], axis=2).round().astype(np.uint8)


def picture(
    path: Path, width: int = 24, height: int = 16, *, seed: int = 0, caption: str | None = None, **save
) -> Path:
    """Write an RGB picture, and its caption file when there is a caption. The files look old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pattern(width, height, seed)).save(path, **save)
    age(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def age(path: Path) -> None:
    os.utime(path, ns=(OLD_NS, OLD_NS))


def data_config(folder: Path, **source) -> DataConfig:
    """A data section with one source; keys that belong to the section itself are picked out."""
    section = {key: source.pop(key) for key in ("on_missing", "on_corrupt") if key in source}
    entry = {"id": "s", "path": str(folder), **source}
    return DataConfig.model_validate({"sets": [{"sources": [entry]}], "workers": {"scan": 2}, **section})
