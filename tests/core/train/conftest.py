"""A tiny model in real file layouts, a few pictures, and a configuration that trains on them in seconds."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.fixtures.tiny_anima import DENOISER, make_tiny_anima
from tuner.core.memory.streaming import Streaming
from tuner.core.train import trainer


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"family": "anima", **make_tiny_anima(tmp_path_factory.mktemp("models"))}


@pytest.fixture(scope="session")
def six_blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model with enough blocks to stream some of them."""
    return {"family": "anima", **make_tiny_anima(tmp_path_factory.mktemp("six"), denoiser=replace(DENOISER, blocks=6))}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of two aspect ratios with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        size = (96, 96) if number % 2 else (128, 72)
        Image.effect_noise(size, 40 + 20 * number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red dog, number {number}, on grass", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests: entries are named by what they are made of, so tests cannot disturb each other."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_config(model_files, pictures, cache_dir, tmp_path):
    """A function from changes by dotted path to a configuration; the run folder is ``out`` below ``tmp_path``."""

    def make(**changes: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model": dict(model_files),
            "data": {
                "sets": [
                    {
                        "resolution": 64,
                        "batch_size": 2,
                        "buckets": {"min": 32, "step": 16},
                        "sources": [{"id": "dogs", "path": str(pictures), "repeats": 2}],
                    }
                ],
                "workers": {"scan": 0, "cache": 0, "load": 1},
            },
            "cache": {"dir": str(cache_dir)},
            "network": {"rank": 4},
            "optimizer": {"lr": 2e-3},
            "schedule": {"name": "cosine"},
            "train": {"steps": 7, "seed": 3},
            "precision": {"compute": "fp32", "text_encoder": {"qwen3": "fp32", "llm_adapter": "fp32"}},
            "checkpoint": {"dir": str(tmp_path / "out")},
            "log": {"plain": True},
        }
        config = copy.deepcopy(config)
        for path, value in changes.items():
            place: Any = config
            *parents, last = path.split("__")
            for key in parents:
                place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
            place[last] = value
        return config

    return make


@pytest.fixture
def streamings(monkeypatch: pytest.MonkeyPatch) -> list[Streaming]:
    """Those of the runs of a test, in their order; a run that streams nothing has none."""
    made: list[Streaming] = []

    def remembered(*args: Any) -> Streaming | None:
        streaming = prepare(*args)
        if streaming is not None:
            made.append(streaming)
        return streaming

    prepare = trainer.prepare_blocks
    monkeypatch.setattr(trainer, "prepare_blocks", remembered)
    return made
