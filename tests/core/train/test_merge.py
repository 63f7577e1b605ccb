"""Adapters merged into the base before training, and limits on the norms of those that train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tuner.core.adapters.convert import convert_adapter
from tuner.core.adapters.limits import update_norm
from tuner.core.adapters.merging import merge_adapters, read_merges
from tuner.core.adapters.network import adapter_strength, network_tensors
from tuner.core.errors import UsageError
from tuner.core.registry import open_run
from tuner.core.track.events import read_events
from tuner.core.train.measure import shake
from tuner.core.train.run import cache_only, train
from tuner.plugins.anima.names import MAPS

PARTS = ["denoiser", "qwen3"]
KINDS = [{"rank": 4}, {"type": "lokr", "rank": 2, "factor": 4}, {"type": "dora", "rank": 2}]


@pytest.fixture(params=KINDS, ids=lambda network: network.get("type", "lora"))
def adapter(request, make_config, tmp_path) -> tuple[dict, Path]:
    """An adapter of the denoiser and the text encoder that acts: its configuration and its file."""
    config = make_config(network=request.param, train__components=PARTS, checkpoint__dtype="fp32")
    run = open_run(config)
    models = run.model.load_models(["denoiser", "llm_adapter", "qwen3"])
    network = run.model.build_network(models)
    shake(network, 1)
    path = tmp_path / "first.safetensors"
    run.model.save(network, network_tensors(network), path, {})
    return config, path


def prediction(run, models) -> torch.Tensor:
    with torch.no_grad():
        text = run.model.encode_text(models, ["a red dog"])
        noisy = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
        return run.model.predict(models, noisy, torch.tensor([0.6]), text)


def loaded(config: dict, merge: list[dict]):
    run = open_run({**config, "model": {**config["model"], "merge": merge}, "network": {}, "train": {"steps": 1}})
    models = run.model.load_models(["denoiser", "llm_adapter", "qwen3"])
    merge_adapters(models, read_merges(run.config, run.facts))
    return run, models


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.5])
def test_the_merged_model_is_the_adapted_one(adapter, strength):
    config, path = adapter
    run = open_run({**config, "network": {**config["network"], "init_from": str(path)}})
    models = run.model.load_models(["denoiser", "llm_adapter", "qwen3"])
    network = run.model.build_network(models)
    with adapter_strength(network, strength):
        expected = prediction(run, models)
    plain = prediction(*loaded(config, []))
    merged = prediction(*loaded(config, [{"path": str(path), "strength": strength}]))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert float((merged - plain).abs().max()) > 1e-3


def test_two_merges_are_summed_and_rounded_once(adapter):
    config, path = adapter
    bf16 = {**config, "precision": {"compute": "bf16"}}
    twice = loaded(bf16, [{"path": str(path), "strength": 0.5}, {"path": str(path), "strength": -0.5}])[1]
    plain = loaded(bf16, [])[1]
    if config["network"].get("type") == "dora":
        return  # its second half turns what the first has turned
    for name, value in plain.denoiser.state_dict().items():
        assert torch.equal(twice.denoiser.state_dict()[name], value), name


def test_a_run_on_a_merged_base_says_so_and_reads_no_stale_captions(make_config, adapter, tmp_path):
    config, path = adapter
    model = {**config["model"], "merge": [{"path": str(path), "strength": 0.5}]}
    options = {"model": model, "quantize": {"denoiser": "int8"}, "train__steps": 2}
    cache_only(make_config(cache__dir=str(tmp_path / "cache")))
    folder = train(make_config(cache__dir=str(tmp_path / "cache"), **options)).folder
    stages = [e for e in read_events(folder / "events.jsonl") if e["kind"] == "stage" and e["state"] == "end"]
    assert {stage["name"]: bool(stage["items"]) for stage in stages} == {"captions": True, "latents": False}
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        told = file.metadata()["tuner_merged_into_base"]
    assert told.startswith("first (") and told.endswith(") x 0.5")
    with pytest.raises(UsageError, match=r"model\.merge"):
        train(make_config(cache__dir=str(tmp_path / "cache"), train__steps=3), resume="auto")


def test_any_format_is_merged(adapter, tmp_path):
    config, path = adapter
    if config["network"].get("type"):
        return
    other = tmp_path / "other.safetensors"
    convert_adapter(path, other, "sd-scripts", MAPS)
    one, two = (prediction(*loaded(config, [{"path": str(each)}])) for each in (path, other))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "words"),
    [({"nothing.lora_down.weight": torch.ones(2, 2)}, "belong to no module"), (None, "no such file|not a safetensors")],
)
def test_a_file_that_is_no_adapter_of_this_model_is_refused(make_config, tmp_path, content, words):
    path = tmp_path / "odd.safetensors"
    if content is not None:
        save_file(content, path)
    model = {**make_config()["model"], "merge": [{"path": str(path)}]}
    with pytest.raises(UsageError, match=words):
        train(make_config(model=model))


def test_strength_zero_has_no_effect_and_is_refused(make_config):
    model = {**make_config()["model"], "merge": [{"path": "a.safetensors", "strength": 0}]}
    with pytest.raises(UsageError, match="at strength 0 it has no effect"):
        train(make_config(model=model))


def test_norms_stay_below_the_limit_and_are_recorded(make_config):
    options = {"optimizer": {"lr": 5e-2}, "schedule": {"name": "constant"}, "train__steps": 4}
    folder = train(make_config(network={"rank": 4, "max_norm": 0.2}, **options)).folder
    steps = [event for event in read_events(folder / "events.jsonl") if event["kind"] == "step"]
    assert steps[-1]["adapter_norm_max"] == pytest.approx(0.2, rel=1e-4) and steps[-1]["adapters_limited"] > 0
    assert 0 < steps[-1]["adapter_norm_mean"] <= 0.2
    tensors = load_file(next(folder.glob("*.safetensors")))
    for name in (name for name in tensors if name.endswith("lora_A.weight")):
        product = tensors[name.replace("lora_A", "lora_B")].float() @ tensors[name].float()
        assert float(product.norm()) <= 0.2 * 1.01


def test_a_norm_is_that_of_the_update(make_config):
    run = open_run(make_config(network={"rank": 4, "alpha": 8}))
    network = run.model.build_network(run.model.load_models(["denoiser"]))
    shake(network, 1)
    _, layer = next(network.module.items())
    expected = (layer.up.flatten(1) @ layer.down.flatten(1)).norm() * 2
    torch.testing.assert_close(update_norm(layer), expected.detach())


def test_other_kinds_have_no_limit(make_config):
    with pytest.raises(UsageError, match="only with 'lora'"):
        train(make_config(network={"type": "loha", "rank": 2, "max_norm": 1.0}))
