from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.core.registry.conftest import site  # noqa: F401  # the same installed toys
from tests.core.registry.toys import Site, write_header
from tuner.core.config.document import merged


class Project:
    """A folder with weights, three captioned pictures and a configuration for the toy model ``cubist``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_header(folder / "weights.safetensors", "cubist.weight")
        images = folder / "images"
        images.mkdir()
        for number, width in enumerate((64, 64, 96)):
            Image.new("RGB", (width, 64), (40 * number, 90, 30)).save(images / f"{number}.png")
            (images / f"{number}.txt").write_text("a square", encoding="utf-8")

    def config(self, **sections: Any) -> str:
        """Write ``config.json`` and return its path."""
        base = {
            "model": {"family": "cubist", "path": "weights.safetensors"},
            "data": {
                "sets": [
                    {"resolution": 64, "buckets": {"step": 16, "min": 32}, "sources": [{"id": "a", "path": "images"}]}
                ],
                "workers": {"scan": 0, "cache": 0, "load": 0},
            },
            "optimizer": {"lr": 1e-4},
            "train": {"steps": 4},
            "checkpoint": {"dir": "out"},
        }
        path = self.folder / "config.json"
        path.write_text(json.dumps(merged(base, sections)), encoding="utf-8")
        return str(path)


@pytest.fixture
def project(tmp_path: Path, site: Site) -> Project:  # noqa: F811
    site.model("cubist")
    folder = tmp_path / "project"
    folder.mkdir()
    return Project(folder)
