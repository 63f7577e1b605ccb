"""A limit on the changes of modules: kept exactly, told of, and nothing to modules within it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.core.adapters.toy import FACTS, toy_config, toy_models
from tests.core.train.test_modes import losses, stop_after
from tuner.core.adapters.limits import limit_norms
from tuner.core.adapters.lora import inject_lora
from tuner.core.adapters.network import network_tensors
from tuner.core.errors import UsageError
from tuner.core.track.events import read_events
from tuner.core.train.run import train

HARD = {"optimizer__lr": 5e-2, "schedule": {"name": "constant"}, "train__steps": 4}


def test_modules_beyond_the_limit_shrink_as_sd_scripts_shrinks_them_and_others_keep_every_bit():
    models = toy_models()
    network = inject_lora(models, toy_config({"rank": 2, "alpha": 3.0, "include": ["embed"]}), FACTS)
    generator = torch.Generator().manual_seed(1)
    for number, parameter in enumerate(network.module.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 + 0.05 * number))
    wanted, after, count = {}, [], 0
    for _, layer in network.module.items():
        norm = float((layer.up.data.flatten(1) @ layer.down.data.flatten(1)).norm()) * 1.5
        root = min(1.0, 1.2 / norm) ** 0.5
        count += norm > 1.2
        after.append(min(norm, 1.2))
        wanted[layer] = [value * root if norm > 1.2 else value.clone() for value in (layer.down.data, layer.up.data)]
    told = limit_norms(network, 1.2)
    assert 0 < count < len(wanted)
    assert told.scaled == count
    assert told.largest == pytest.approx(1.2) == max(after)
    assert told.mean == pytest.approx(sum(after) / len(after), rel=1e-5)
    for layer, (down, up) in wanted.items():
        torch.testing.assert_close(layer.down.data, down, rtol=1e-5, atol=0)
        torch.testing.assert_close(layer.up.data, up, rtol=1e-5, atol=0)
    once = {key: value.clone() for key, value in network_tensors(network).items()}
    limit_norms(network, 1.3)
    assert all(torch.equal(value, once[key]) for key, value in network_tensors(network).items())


@pytest.mark.parametrize("fuse", ["off", "parameter"])
def test_a_run_stays_within_its_limit_says_so_and_goes_on_exactly(make_config, tmp_path, fuse):
    options = {"network": {"rank": 4, "max_norm": 0.3}, **HARD}
    if fuse != "off":
        options |= {"optimizer": {"lr": 5e-2, "fuse": fuse}, "train__clip_grad": None}
        options.pop("optimizer__lr")
    train(make_config(checkpoint__dir=str(tmp_path / "whole/run"), **options))
    config = make_config(checkpoint__dir=str(tmp_path / "parts/run"), **options)
    stop_after(config, 2)
    train(config, resume="auto")
    whole, parts = tmp_path / "whole/run", tmp_path / "parts/run"
    assert losses(parts) == losses(whole)
    assert (parts / "run.safetensors").read_bytes() == (whole / "run.safetensors").read_bytes()
    last = [event for event in read_events(whole / "events.jsonl") if event["kind"] == "step"][-1]
    assert last["adapter_norm_scaled"] > 0
    assert last["adapter_norm_mean"] <= last["adapter_norm_largest"] <= 0.3
    tensors = load_file(whole / "run.safetensors")
    norms = [
        float((tensors[name.replace("lora_A", "lora_B")].float() @ down.float()).norm())
        for name, down in tensors.items()
        if "lora_A" in name
    ]
    assert max(norms) == pytest.approx(0.3, rel=2e-2)


def test_where_the_limit_means_nothing_it_is_refused(make_config):
    with pytest.raises(UsageError, match="only with 'lora'"):
        train(make_config(network={"type": "lokr", "rank": 2, "max_norm": 1}))
    optimizer = {"name": "adamw_schedulefree", "lr": 1e-3}
    with pytest.raises(UsageError, match="schedule-free"):
        train(make_config(network__max_norm=1, optimizer=optimizer, schedule={"name": "constant"}))
