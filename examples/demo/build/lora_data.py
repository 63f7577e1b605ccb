"""The LoRA's pictures: the new thing to train on, the same held out, and known things against forgetting."""

from __future__ import annotations

import random
from pathlib import Path

from . import pictures
from .pictures import Scene

TRAIN, HELD_OUT, KNOWN = 24, 16, 48


def write_set(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    """One PNG and one caption file per scene."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        stem = folder / f"{scene.shape}_{index:02d}"
        pictures.draw(scene).save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(pictures.caption(scene, rng) + "\n", encoding="utf-8")


def known_scenes(count: int, seed: int) -> list[Scene]:
    """Known things; the shapes take turns."""
    rng = random.Random(seed)
    return [pictures.random_scene(rng, (pictures.SHAPES[index % len(pictures.SHAPES)],)) for index in range(count)]


def write_lora_data(folder: Path) -> None:
    """`wug/` (24), `held_out/` (16, other draws) and `known/` (48) below `folder`."""
    rng = random.Random(21)
    write_set(folder / "wug", pictures.new_scenes(TRAIN, 22), rng)
    write_set(folder / "held_out", pictures.new_scenes(HELD_OUT, 23), rng)
    write_set(folder / "known", known_scenes(KNOWN, 24), rng)
