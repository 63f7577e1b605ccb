"""Adapters of every kind on the demo's model: what trained, its file, and the base with it merged predict the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tuner.core.adapters.network import load_network_tensors
from tuner.core.config.load import load_config
from tuner.core.config.network import KEYS_OF_KINDS, AdapterKind
from tuner.core.testing.bench import Bench
from tuner.core.train.checkpoint import STATE_TENSORS, list_checkpoints
from tuner.core.train.folder import RunFolder
from tuner.core.train.quantizing import load_components

DEMO = Path(__file__).parents[3] / "examples" / "demo" / "config.json"
NEAR = 1e-4
"""Largest difference between predictions, whose size is about 1: one product instead of two, in float32."""
KINDS: dict[str, dict[str, Any]] = {
    **{kind: {"type": kind} for kind in get_args(AdapterKind)},
    "lora with norms": {"type": "lora", "train_norms": True},
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    model = load_config(DEMO, env={})["model"]
    return Bench("anima", {"model": {**model, "family": "anima"}}, tmp_path_factory.mktemp("kinds"), 2e-2)


@pytest.mark.parametrize("name", KINDS)
def test_what_trained_its_file_and_the_merged_base_predict_the_same(bench: Bench, name: str) -> None:
    # The rank of the bench is taken back where it means nothing.
    network = {**KINDS[name], "rank": 4 if KINDS[name]["type"] in KEYS_OF_KINDS["rank"] else 16}
    settings: dict[str, Any] = {"network": network, "checkpoint": {"dtype": "fp32", "name": "adapter"}}
    settings["checkpoint"]["dir"] = str(bench.folder / name)
    folder = bench.train(name, train={"steps": 3}, **settings)
    run = bench.open(**settings)
    models, live = bench.adapted(run)
    state = load_file(list_checkpoints(RunFolder(folder, "adapter"))[-1] / STATE_TENSORS)
    load_network_tensors(
        live, {key.removeprefix("network/"): value for key, value in state.items() if key.startswith("network/")}
    )
    batch = bench.batch()
    trained = bench.predict(run, models, batch)
    base = bench.predict(bench.run, bench.models, batch)
    assert float((trained - base).abs().max()) > 100 * NEAR, "the adapter has next to no effect"

    file = str(folder / "adapter.safetensors")
    start = {**KINDS[name], "rank": "from_file", "init_from": file}
    reopened = bench.open(network=start)
    assert_near(bench.predict(reopened, bench.adapted(reopened)[0], batch), trained)
    merged = bench.open(model={"merge": [{"path": file}]})
    assert_near(bench.predict(merged, load_components(merged, ["denoiser"], torch.device("cpu")), batch), trained)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=NEAR)
