"""What would train is known before a weight is read: the modules and values of the run, and patterns checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs import run_document
from tests.fixtures.tiny_anima import make_tiny_anima
from tests.fixtures.tiny_flux import make_tiny_flux
from tests.fixtures.tiny_sd3 import make_tiny_sd3
from tuner.core.adapters.network import adapter_summary, count_parameters
from tuner.core.errors import UsageError
from tuner.core.registry import Run, open_run
from tuner.core.train.check import adapter_lines, check_network

MAKE = {"anima": make_tiny_anima, "flux": make_tiny_flux, "sd3": make_tiny_sd3}
ENCODER = {"anima": "qwen3", "flux": "t5", "sd3": "clip_g"}


@pytest.fixture(scope="module", params=MAKE)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"family": request.param, **MAKE[request.param](tmp_path_factory.mktemp(request.param))}


def opened(model: dict[str, Any], folder: Path, network: dict[str, Any]) -> Run:
    components = ["denoiser", ENCODER[model["family"]]]
    document = run_document(model, folder, cache=folder, out=folder / "out", steps=2, network=network)
    return open_run(document | {"train": {"steps": 2, "components": components}})


@pytest.mark.parametrize(
    "network", [{"rank": 4, "alpha": 2}, {"type": "lokr", "rank": 2}, {"type": "dora", "rank": 2, "split_fused": False}]
)
def test_the_lines_are_those_of_the_run(family: dict[str, Any], network: dict[str, Any], tmp_path: Path) -> None:
    run = opened(family, tmp_path, network)
    lines = adapter_lines(run.config, run.facts)
    built = run.model.build_network(run.model.load_models(run.config.train.components))
    told = [re.search(r"(\d+) modules.*, ([\d,]+) values", line) for line in lines]
    assert sum(int(match[2].replace(",", "")) for match in told if match) == count_parameters(built)
    assert sum(int(match[1]) for match in told if match) == sum(row.modules for row in adapter_summary(built))
    assert {line.split()[0] for line in lines} == set(run.config.train.components)


def test_a_pattern_that_matches_nothing_is_told_before_anything_is_loaded(
    family: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(family, tmp_path, {"rank": 4, "exclude": [r".*\.no_such_layer"]})
    with pytest.raises(UsageError, match="matches no module"):
        check_network(run.config, run.facts)
    check_network(opened(family, tmp_path, {"rank": 4, "exclude": [r".*attn.*"]}).config, run.facts)
