"""A tiny Anima on disk, and configurations that use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.tiny_anima import make_tiny_anima
from tuner.core.config import RunConfig, build_config
from tuner.plugins.anima.config import AnimaConfig


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ``model`` section for a tiny random Anima; treat its files as read-only."""
    return make_tiny_anima(tmp_path_factory.mktemp("tiny_anima"))


@pytest.fixture(scope="session")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """(model section, other sections by name) -> a complete configuration."""
    out: Path = tmp_path_factory.mktemp("out")

    def build(model: dict[str, Any], **sections: Any) -> RunConfig:
        raw = {
            "model": model,
            "data": {"sets": [{"resolution": 64, "sources": [{"id": "pictures", "path": "pictures"}]}]},
            "optimizer": {"name": "adamw", "lr": 1e-4},
            "train": {"steps": 10},
            "checkpoint": {"dir": str(out)},
        }
        for name, section in sections.items():
            raw[name] = {**raw.get(name, {}), **section}
        return build_config(raw, AnimaConfig)

    return build
