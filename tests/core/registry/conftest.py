from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.registry.toys import Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty folder for plugins, first on ``sys.path``; its modules are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "memory"))
    monkeypatch.delenv("TUNER_DEBUG_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield Site(folder)
    for name in [name for name in sys.modules if name.split(".")[0].startswith("toy_")]:
        del sys.modules[name]
