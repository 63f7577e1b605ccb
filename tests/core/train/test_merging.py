"""Adapters that are part of the base: they act as recorded, in every way to load, and the run stays what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.core.train.test_modes import STILL, losses, stop_after
from tuner.core.adapters.deltas import merged_weight
from tuner.core.adapters.files import read_adapter, save_adapter
from tuner.core.adapters.formats import format_by_name, key_maps, modules_of, parts_of
from tuner.core.adapters.network import network_tensors
from tuner.core.compute.quantized import QuantizedLinear
from tuner.core.data.plan import plan_data
from tuner.core.errors import UsageError
from tuner.core.registry import open_model, open_run
from tuner.core.train import trainer
from tuner.core.train.caching import Caches
from tuner.core.train.check import check
from tuner.core.train.quantizing import load_components
from tuner.core.train.run import train

CPU = torch.device("cpu")
EVERYTHING = ["denoiser", "llm_adapter", "qwen3"]


@pytest.fixture
def adapter(make_config, tmp_path):
    """(components, network section) -> a file of an adapter with values that act."""

    def make(components=("denoiser",), **network: Any) -> Path:
        run = open_run(make_config(train__components=list(components), network=network))
        net = run.model.build_network(run.model.load_models(components))
        generator = torch.Generator().manual_seed(5)
        for parameter in net.module.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        path = tmp_path / f"{len(components)}{network['rank']}.safetensors"
        return save_adapter(network_tensors(net), format_by_name(key_maps(run.facts), None), path, {})

    return make


def merged_run(make_config, *entries: tuple[Path, float], **changes: Any):
    return open_run(make_config(model__merge=[{"path": str(p), "strength": s} for p, s in entries], **changes))


def test_a_merge_into_what_no_file_of_a_full_training_holds_is_told(make_config, adapter, caplog):
    path = adapter(["denoiser", "llm_adapter"], rank=2)
    run = merged_run(make_config, (path, 1.0), train__mode="full", network={})
    load_components(run, ["denoiser", "llm_adapter"], CPU)
    assert "llm_adapter does not train, so what is merged into it" in caplog.text
    assert "denoiser does not train" not in caplog.text


def test_every_weight_is_the_sum_rounded_once_and_others_stay(make_config, adapter):
    one, two = adapter(EVERYTHING, rank=4), adapter(rank=2, targets=[r".*mlp.*"])
    precision = {"compute": "bf16", "text_encoder": {"qwen3": "fp32", "llm_adapter": "bf16"}}
    plain = load_components(open_run(make_config(precision=precision)), EVERYTHING, CPU)
    run = merged_run(make_config, (one, 0.7), (two, -1.5), precision=precision)
    loaded = load_components(run, EVERYTHING, CPU)
    files = [(read_adapter(path, key_maps(run.facts)).tensors, by) for path, by in ((one, 0.7), (two, -1.5))]
    changed = set()
    for name in EVERYTHING:
        weights = dict(loaded.component(name).named_parameters())
        for key, weight in plain.component(name).named_parameters():
            wanted = weight.float()
            for tensors, strength in files:
                if parts := parts_of(tensors, name, key.removesuffix(".weight")):
                    wanted = merged_weight(wanted, parts, strength)
                    changed.add((name, key.removesuffix(".weight")))
            assert torch.equal(weights[key], wanted.to(weight.dtype)), key
    assert changed == {place for tensors, _ in files for place in modules_of(tensors)}


def test_projections_that_share_a_storage_keep_sharing_it(make_config, adapter):
    run = merged_run(make_config, (adapter(rank=4), 1.0))
    attention = load_components(run, ["denoiser"], CPU).denoiser.blocks[0].self_attn
    group = attention.q_proj.storage_group
    parts = [member.weight for member in group.members]
    assert torch.equal(group.weight, torch.cat(parts))
    assert parts[0].data_ptr() == group.weight.data_ptr()


def test_merging_comes_before_quantization(make_config, adapter):
    path = adapter(rank=4)
    exact = load_components(merged_run(make_config, (path, 1.0)), ["denoiser"], CPU).denoiser
    coarse = load_components(merged_run(make_config, (path, 1.0), quantize={"denoiser": "int8"}), ["denoiser"], CPU)
    linear = coarse.denoiser.blocks[0].mlp.layer1
    assert isinstance(linear, QuantizedLinear)
    wanted = exact.blocks[0].mlp.layer1.weight
    assert (linear.weight - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_a_run_on_a_merged_base_learns_as_one_whose_file_is_merged(make_config, adapter, six_blocks, tmp_path):
    """And it does so with streamed blocks."""
    entry = {"path": str(adapter(rank=4)), "strength": 0.8}
    merged = {"model": {**six_blocks, "merge": [entry]}, "train__steps": 2}
    train(make_config(checkpoint__dir=str(tmp_path / "merged"), memory__swap_blocks=4, **merged))
    weights = load_components(open_run(make_config(**merged)), ["denoiser"], CPU).denoiser.state_dict()
    stored = load_file(six_blocks["path"])
    written = {name: weights.get(name.removeprefix("net."), value) for name, value in stored.items()}
    assert any(not torch.equal(written[name], value.to(written[name].dtype)) for name, value in stored.items())
    save_file({name: value.clone() for name, value in written.items()}, tmp_path / "base.safetensors")
    plain = {"model": {**six_blocks, "path": str(tmp_path / "base.safetensors")}, "train__steps": 2}
    train(make_config(checkpoint__dir=str(tmp_path / "file"), **plain))
    assert losses(tmp_path / "merged") == losses(tmp_path / "file")


def test_the_file_says_what_its_base_has_in_it(make_config, adapter, tmp_path):
    path = adapter(rank=4)
    train(make_config(model__merge=[{"path": str(path), "strength": 0.5}], **STILL))
    with safe_open(tmp_path / "out/out.safetensors", "pt") as file:
        strings = file.metadata()
    [told] = json.loads(strings["tuner_merged_into_base"])
    assert (told["file"], told["strength"]) == (path.name, 0.5)
    assert str(path.parent) not in str(strings)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["merged"] == [told]


def test_encodings_are_named_by_what_was_merged_into_their_encoder(make_config, adapter):
    denoiser, both = adapter(rank=4), adapter(EVERYTHING, rank=4)

    def key(*entries: tuple[Path, float]) -> str:
        run = merged_run(make_config, *entries)
        text = Caches(run, plan_data(run.config, run.facts), CPU, None).data.text
        return text.key("a dog").name

    names = [key(), key((denoiser, 1.0)), key((both, 1.0)), key((both, 0.5))]
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_another_file_under_the_same_name_is_another_run(make_config, adapter, tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_bytes(adapter(rank=4).read_bytes())
    config = make_config(train__steps=2, model__merge=[{"path": str(path)}])
    stop_after(config, 1)
    path.write_bytes(adapter(rank=2, targets=[r".*mlp.*"]).read_bytes())
    with pytest.raises(UsageError, match="not the configuration") as caught:
        train(config, resume="auto")
    assert "model.merge" in str(caught.value.where)
    path.write_bytes(adapter(rank=4).read_bytes())
    train(config, resume="auto")


def test_what_cannot_be_merged_is_named(make_config, adapter, tmp_path):
    good = load_file(adapter(rank=4))

    def refused(tensors: dict[str, torch.Tensor], message: str, **changes: Any) -> None:
        save_file(tensors, tmp_path / "bad.safetensors")
        config = make_config(model__merge=[{"path": str(tmp_path / "bad.safetensors")}], **changes)
        with pytest.raises(UsageError, match=message):
            train(config)

    refused({**good, "unet.down.0.lora_A.weight": torch.zeros(1)}, "unet.down.0")
    refused({}, "adapter")
    narrow = {name: value[..., :2].contiguous() if "lora_A" in name else value for name, value in good.items()}
    refused(narrow, "does not fit")
    refused({name: value * float("nan") for name, value in good.items()}, "not finite")
    with pytest.raises(UsageError, match=r"model\.merge.*strength|0 adds nothing"):
        train(make_config(model__merge=[{"path": "a", "strength": 0}]))
    with pytest.raises(UsageError, match=r"No such file|cannot read"):
        train(make_config(model__merge=[{"path": str(tmp_path / "absent.safetensors")}]))
    bad = make_config(model__merge=[{"path": str(tmp_path / "bad.safetensors")}])
    save_file({"nothing": torch.zeros(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(UsageError, match="nothing"):
        check(bad)
    model = dict(bad["model"])
    with pytest.raises(UsageError, match="training runs alone"):
        open_model(model.pop("family"), model)


def test_a_whole_model_is_trained_and_written_with_the_adapter_in_it(make_config, adapter, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(trainer, "export", lambda run, network, *_, **__: kept.append(network_tensors(network)) or [])
    options = {"train": {"steps": 1, "mode": "full", "seed": 3}, "optimizer": {"lr": 1e-12}}
    config = make_config(model__merge=[{"path": str(adapter(rank=4))}], **options)
    del config["network"]
    train(config)
    wanted = load_components(merged_run(make_config, (adapter(rank=4), 1.0)), ["denoiser"], CPU).denoiser
    for name, value in wanted.named_parameters():
        torch.testing.assert_close(kept[-1][f"denoiser:{name}"], value, rtol=0, atol=1e-6)
