"""A tiny model of each flavour in real file layouts, and configurations that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs import small_config
from tests.fixtures.tiny_flux import make_tiny_flux
from tuner.core.config import RunConfig, resolve_defaults
from tuner.core.types import ModelFacts
from tuner.plugins.flux.config import FluxConfig
from tuner.plugins.flux.facts import facts


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The ``model`` section of a flavour; treat its files as read-only."""
    made: dict[str, dict[str, Any]] = {}

    def model(flavour: str = "dev") -> dict[str, Any]:
        if flavour not in made:
            made[flavour] = make_tiny_flux(tmp_path_factory.mktemp(flavour), flavour)  # type: ignore[arg-type]
        return dict(made[flavour])

    return model


@pytest.fixture(scope="session")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """(model section, other sections by name) -> a complete configuration in float32."""
    out: Path = tmp_path_factory.mktemp("out")

    def build(model: dict[str, Any], **sections: Any) -> RunConfig:
        return small_config(model, out, FluxConfig, **sections)

    return build


@pytest.fixture
def opened(tiny, run_config) -> Callable[..., tuple[RunConfig, ModelFacts]]:
    """(flavour, sections) -> the configuration with its defaults, and the facts."""

    def make(flavour: str = "dev", **sections: Any) -> tuple[RunConfig, ModelFacts]:
        config = run_config(sections.pop("model", None) or tiny(flavour), **sections)
        found = facts(config)
        return resolve_defaults(config, found), found

    return make
