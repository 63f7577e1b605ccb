"""A tiny SD3 on disk, configurations that use it, and the golden models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.fixtures.runs import small_config
from tests.fixtures.tiny_sd3 import make_tiny_sd3
from tests.plugins.sd3.golden_models import golden_sources
from tuner.core.config import RunConfig
from tuner.core.types import Placement
from tuner.plugins.sd3.config import SD3Config
from tuner.plugins.sd3.load import load_denoiser


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """(flavour, layout, with_t5) -> the ``model`` section of a tiny random SD3; treat its files as read-only."""
    made: dict[tuple[Any, ...], dict[str, Any]] = {}

    def model(flavour: str = "sd3m", layout: str = "all-in-one", with_t5: bool = True) -> dict[str, Any]:
        key = (flavour, layout, with_t5)
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny_sd3")
            made[key] = make_tiny_sd3(folder, flavour=flavour, layout=layout, with_t5=with_t5)
        return dict(made[key])

    return model


@pytest.fixture(scope="session")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """(model section, other sections by name) -> a complete configuration in float32."""
    out: Path = tmp_path_factory.mktemp("out")

    def build(model: dict[str, Any], **sections: Any) -> RunConfig:
        return small_config(model, out, SD3Config, **sections)

    return build


@pytest.fixture(scope="session")
def golden_model() -> Callable[[str], nn.Module]:
    """``sd3m`` or ``sd35m`` to the golden transformer in float32, loaded afresh."""
    return lambda flavour: load_denoiser(golden_sources(flavour), Placement())
