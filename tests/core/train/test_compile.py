"""Whole runs with compiled blocks: the outcome of plain ones up to rounding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner.core.track.events import read_events
from tuner.core.train.compiling import CACHE_VARIABLE
from tuner.core.train.run import train
from tuner.core.train.verify import verify

COMPILED = {"enabled": True, "backend": "eager"}
BUSY: dict[str, Any] = {
    "train__steps": 2,
    "network__dropout": 0.2,
    "network__targets": [r".*\.mlp\.layer1"],
    "validate": {"split": 0.2, "every": 2},
    "sample": {"prompts": ["a red dog --w 96 --h 96 --s 1"], "every": 2},
    "ema": {"enabled": True, "decay": 0.5},
}
"""Passes with and without gradients, of the adapter, of its average and of the base, at sizes that data lacks."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def numbers(folder: Path) -> list[float]:
    keys = ("loss", "grad_norm", "adapted", "base")
    events = read_events(folder / "events.jsonl")
    return [each[key] for each in events for key in keys if isinstance(each.get(key), float)]


def test_a_run_has_the_same_outcome(make_config, tmp_path):
    plain, compiled = tmp_path / "plain/run", tmp_path / "compiled/run"
    train(make_config(checkpoint__dir=str(plain), **BUSY))
    before = os.environ.get(CACHE_VARIABLE)
    train(make_config(checkpoint__dir=str(compiled), compile=COMPILED, memory={"checkpointing": "block"}, **BUSY))
    assert os.environ.get(CACHE_VARIABLE) == before
    assert numbers(compiled) == pytest.approx(numbers(plain), rel=1e-4)
    expected = load_file(plain / "run.safetensors")
    found = load_file(compiled / "run.safetensors")
    assert list(found) == list(expected)
    assert {path.name for path in compiled.rglob("*.png")} == {path.name for path in plain.rglob("*.png")}


@pytest.mark.parametrize(
    "services",
    [
        {
            "quantize": {"denoiser": "int8"},
            "memory": {"swap_blocks": 4, "checkpointing": "block"},
            "guidance": {"distill": {"scale": 2}},
            "train__accumulate": 2,
        },
        {"train__mode": "full", "memory": {"checkpointing": "block"}, "network": {}},
    ],
    ids=["quantized, streamed, guided", "full"],
)
def test_other_services_give_the_same_numbers_compiled(make_config, six_blocks, tmp_path, services):
    found = []
    for name in ("plain", "compiled"):
        changes = {"compile": COMPILED} if name == "compiled" else {}
        folder = tmp_path / name / "run"
        train(make_config(model=six_blocks, checkpoint__dir=str(folder), train__steps=2, **changes, **services))
        found.append(numbers(folder))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_verify_compares_compiled_blocks(make_config):
    found = verify(make_config(compile=COMPILED, network__targets=[r".*\.mlp\.layer1"]))
    assert [row.name for row in found.rows] == ["compiled blocks"] and found.ok
