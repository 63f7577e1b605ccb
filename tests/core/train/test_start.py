"""Whole runs from other starts: neutral at first, exact when resumed, and files that fit the original base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.core.train.test_modes import losses, stop_after
from tuner.core.adapters.deltas import merged_weight
from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import key_maps, modules_of, parts_of
from tuner.core.adapters.network import exported_tensors
from tuner.core.data.plan import plan_data
from tuner.core.errors import UsageError
from tuner.core.registry import open_run
from tuner.core.track.events import read_events
from tuner.core.train import trainer
from tuner.core.train.caching import Caches
from tuner.core.train.quantizing import load_components
from tuner.core.train.run import train

CPU = torch.device("cpu")
HARD = {"optimizer__lr": 1e-2, "schedule": {"name": "constant"}}
SERVICES: dict[str, dict[str, Any]] = {
    "pissa, streamed and recomputed, with an average": {
        "network__init": "pissa",
        "memory": {"swap_blocks": 4, "checkpointing": "block"},
        "ema": {"enabled": True, "decay": 0.5},
    },
    "pissa, its rest in four bits": {"network__init": "pissa", "quantize": {"denoiser": "nf4"}},
    "olora in bfloat16, with dropout": {
        "network": {"rank": 4, "init": "olora", "dropout": 0.2},
        "precision": {"compute": "bf16", "text_encoder": {"qwen3": "fp32", "llm_adapter": "fp32"}},
    },
    "loftq": {"network__init": "loftq", "quantize": {"denoiser": "int4"}},
}


@pytest.mark.parametrize("changes", SERVICES.values(), ids=SERVICES)
def test_stopped_it_goes_on_exactly(make_config, six_blocks, tmp_path, changes, monkeypatch):
    options = {"model": dict(six_blocks), "train__steps": 3, **HARD, **changes}
    train(make_config(checkpoint__dir=str(tmp_path / "whole/run"), **options))
    config = make_config(checkpoint__dir=str(tmp_path / "parts/run"), **options)
    stop_after(config, 2)
    # What was split once is taken from the checkpoint: nothing is decomposed again.
    monkeypatch.setattr(torch.linalg, "svd", None)
    monkeypatch.setattr(torch.linalg, "qr", None)
    train(config, resume="auto")
    whole, parts = tmp_path / "whole/run", tmp_path / "parts/run"
    assert losses(parts) == losses(whole)
    for file in whole.glob("*.safetensors"):
        assert (parts / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora"])
def test_the_first_loss_and_the_base_are_those_of_the_usual_start(make_config, tmp_path, init):
    found = []
    for name in ("default", init):
        options = {"network__init": name, "train__steps": 2, "validate": {"split": 0.3, "every": 1}}
        train(make_config(checkpoint__dir=str(tmp_path / name), **options))
        looked = [event for event in read_events(tmp_path / name / "events.jsonl") if event["kind"] == "validation"]
        found.append((losses(tmp_path / name), looked[-1]["base"]))
    assert found[1][0][1] == pytest.approx(found[0][0][1], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert found[1][0][2] != found[0][0][2]


def test_the_file_on_the_original_base_is_the_live_model(make_config, tmp_path, monkeypatch):
    """It also tells its readers the rank that is in it, and starts a usual run."""
    live = {}

    def look(run, network, *rest, **options):
        models = keep[0]
        for target, layer in network.module.items():
            base = models.denoiser.get_submodule(target.path)
            live[target.path] = base.weight + layer.alpha / layer.rank * layer.up.detach() @ layer.down.detach()
        return export(run, network, *rest, **options)

    keep, export = [], trainer.export
    original = Caches.load_for_steps
    monkeypatch.setattr(Caches, "load_for_steps", lambda self, *rest: keep.append(original(self, *rest)) or keep[-1])
    monkeypatch.setattr(trainer, "export", look)
    train(make_config(network__init="pissa", train__steps=3, **HARD))
    path = tmp_path / "out/out.safetensors"
    run = open_run(make_config())
    tensors = read_adapter(path, key_maps(run.facts)).tensors
    plain = load_components(run, ["denoiser"], CPU).denoiser
    assert live
    for component, module in modules_of(tensors):
        weight = merged_weight(plain.get_submodule(module).weight, parts_of(tensors, component, module))
        assert (weight - live[module]).norm() < 1e-5 * weight.norm()
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "8"
    start = {"rank": "from_file", "init_from": str(path)}
    train(make_config(checkpoint__dir=str(tmp_path / "next"), network=start, train__steps=1))


@pytest.mark.parametrize("method", ["int8", "int4", "nf4"])
def test_loftq_is_closer_to_the_weights_than_quantization_alone(make_config, method):
    config = make_config(network__init="loftq", quantize={"denoiser": method})
    run = open_run(config)
    models = Caches(run, plan_data(run.config, run.facts), CPU, None).load_for_steps()
    network = run.model.build_network(models)
    plain = load_components(open_run(make_config()), ["denoiser"], CPU).denoiser
    ratios = []
    for target, layer in network.module.items():
        stored, weight = models.denoiser.get_submodule(target.path).weight, plain.get_submodule(target.path).weight
        start = stored + layer.alpha / layer.rank * layer.up.detach() @ layer.down.detach()
        ratios.append(float((start - weight).norm() / (stored - weight).norm()))
    assert max(ratios) < 0.99
    assert not any(bool(value.any()) for value in _changes(exported_tensors(network)))


def _changes(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    found = []
    for place in modules_of(tensors):
        parts = parts_of(tensors, *place)
        product = parts["up"] @ parts["down"]
        found.append(product.abs() > 1e-5)
    return found


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a kind": ({"network": {"type": "dora", "rank": 2, "init": "pissa"}}, "only with 'lora'"),
    "a file": ({"network": {"rank": 4, "init": "gaussian", "init_from": "a.safetensors"}}, "every value comes from"),
    "a limit": ({"network": {"rank": 4, "init": "olora", "max_norm": 1}}, "starts far from zero"),
    "an average": (
        {"network__init": "pissa", "ema": {"enabled": True, "init_from": "a.safetensors"}}, "twice the rank",
    ),
    "nothing quantized": ({"network__init": "loftq"}, "denoiser of train.components is not quantized"),
    "too much rank": ({"network": {"rank": 4096, "init": "pissa"}}, "more than its weight has"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_refused(make_config, changes, message):
    with pytest.raises(UsageError, match=message):
        train(make_config(**changes))
